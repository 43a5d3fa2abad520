#!/bin/sh
# Makes everything that the Makefile's targets need, and is quick when it is there already.
#   packaging/setup-dev.sh            Debian packages, .venv from uv.lock
#   packaging/setup-dev.sh --floors   also .venv-floors: the same on Debian 12's compiled packages
#   packaging/setup-dev.sh --optional Debian packages are wished for, not required (the demo has a fake device)
set -eu
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
DEBIAN_PACKAGES="python3-venv gcc libc6-dev libsimavr-dev libelf-dev gcc-avr avr-libc binutils-avr arduino-core-avr avrdude prometheus"
PYTHON=${PYTHON:-python3}
floors=no
optional=no
for argument in "$@"; do
    case $argument in
        --floors) floors=yes ;;
        --optional) optional=yes ;;
        *) echo "setup-dev.sh: unknown option $argument" >&2; exit 2 ;;
    esac
done

missing=""
for package in $DEBIAN_PACKAGES; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing Debian packages:$missing"
        apt-get -qq update || true
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null || failed=yes
    else
        failed=yes
    fi
    if [ "${failed:-no}" = yes ]; then
        echo "missing Debian packages:$missing" >&2
        echo "get them with: sudo apt-get install$missing" >&2
        [ "$optional" = yes ] || exit 1
    fi
fi

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "edged needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1 || echo missing)." >&2
    echo "name another with: make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
fi

# One stamp per state of the inputs: a changed lock file makes the environment anew.
stamp() { cat pyproject.toml uv.lock packaging/setup-dev.sh | sha256sum | cut -c1-16; }

make_venv() { # folder, then the arguments of uv
    [ -e "$1/.ready-$(stamp)" ] && return
    echo "making $1"
    [ -x "$1/bin/python" ] || "$PYTHON" -m venv "$1"
    "$1/bin/python" -m pip --quiet --disable-pip-version-check install "uv==$UV_VERSION"
    rm -f "$1"/.ready-*
}

export UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 UV_LINK_MODE=copy
make_venv .venv
if [ ! -e ".venv/.ready-$(stamp)" ]; then
    UV_PROJECT_ENVIRONMENT=.venv .venv/bin/uv sync --quiet --frozen --inexact
    touch ".venv/.ready-$(stamp)"
fi
if [ "$floors" = yes ]; then
    make_venv .venv-floors
    if [ ! -e ".venv-floors/.ready-$(stamp)" ]; then
        requirements=$(mktemp)
        trap 'rm -f "$requirements"' EXIT
        .venv/bin/uv export --quiet --frozen --no-hashes --no-emit-project --output-file "$requirements"
        .venv/bin/uv pip install --quiet --python .venv-floors/bin/python \
            --requirements "$requirements" --overrides packaging/floors.txt --editable .
        touch ".venv-floors/.ready-$(stamp)"
    fi
fi
