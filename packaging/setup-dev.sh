#!/bin/sh
# Makes everything that the Makefile's targets need, and is quick when it is there already.
#   packaging/setup-dev.sh            Debian packages, .venv from uv.lock
#   packaging/setup-dev.sh --floors   also .venv-floors: the same on Debian 12's compiled packages
#   packaging/setup-dev.sh --deb      also what builds and checks the Debian package
#   packaging/setup-dev.sh --node     also what boots guests: QEMU, systemd-nspawn, mmdebstrap
#   packaging/setup-dev.sh --demo     as root the same; else only what makes .venv (the demo has a fake device, and names the rest)
set -eu
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
DEBIAN_PACKAGES="gcc libc6-dev libsimavr-dev libelf-dev gcc-avr avr-libc binutils-avr arduino-core-avr avrdude prometheus systemd gnupg shellcheck qemu-system-arm mosquitto mosquitto-clients"
DEB_PACKAGES="build-essential faketime debhelper dh-python lintian apt-utils man-db python3-aiohttp python3-cryptography"
NODE_PACKAGES="mmdebstrap systemd-container qemu-system-x86 qemu-utils e2fsprogs socat qemu-user-static arch-test"
PYTHON=${PYTHON:-python3}
floors=no
demo=no
for argument in "$@"; do
    case $argument in
        --floors) floors=yes ;;
        --demo) demo=yes ;;
        --deb) DEBIAN_PACKAGES="$DEBIAN_PACKAGES $DEB_PACKAGES" ;;
        --node) DEBIAN_PACKAGES="$DEBIAN_PACKAGES $NODE_PACKAGES" ;;
        *) echo "setup-dev.sh: unknown option $argument" >&2; exit 2 ;;
    esac
done

if ! command -v "$PYTHON" >/dev/null; then
    echo "edged needs Python 3.11 or newer; there is no $PYTHON." >&2
    echo "get it with: sudo apt-get install --no-install-recommends python3 python3-venv; or name yours with: make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "edged needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1)." >&2
    echo "name another with: make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
fi

missing=""
"$PYTHON" -c 'import ensurepip' 2>/dev/null || missing=" python3-venv"
if [ "$demo" = no ] || [ "$(id -u)" = 0 ]; then
    for package in $DEBIAN_PACKAGES; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$status" = installed ] || missing="$missing $package"
    done
fi
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
        echo "get them with: sudo apt-get install --no-install-recommends$missing" >&2
        [ "$demo" = yes ] && "$PYTHON" -c 'import ensurepip' 2>/dev/null || exit 1
    fi
fi

# One stamp per state of the inputs: a changed lock file, or a checkout that was moved, makes the environment anew.
stamp() { { pwd -P; cat pyproject.toml uv.lock packaging/setup-dev.sh; } | sha256sum | cut -c1-16; }

# Whole, and made here: a set-up that was interrupted, or a checkout that was moved, leaves one that is not.
usable() { [ -x "$1/bin/python" ] && [ -x "$1/bin/pip" ] && grep -qF "$(pwd -P)/$1" "$1/bin/activate"; }

make_venv() { # folder
    [ -e "$1/.ready-$(stamp)" ] && return
    echo "making $1"
    usable "$1" 2>/dev/null || "$PYTHON" -m venv --clear "$1"
    "$1/bin/python" -m pip --quiet --disable-pip-version-check install "uv==$UV_VERSION" || {
        echo "the libraries come from the Python package index, once: can this machine reach it?" >&2
        exit 1
    }
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
