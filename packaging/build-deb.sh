#!/bin/sh
# Builds dist/edged_VERSION_all.deb on Debian 12 or newer.
#   packaging/build-deb.sh                       the version of packaging/debian/changelog
#   VERSION=0.1.1~test packaging/build-deb.sh    another one, for tests of upgrades; as reproducible
# What is fetched lies in .cache/deb and is held to the hashes of uv.lock; the build itself has no network. The checkout
# stays as it is: the build works on a copy, where packaging/debian is debian.
set -eu
umask 022
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1

# Not in the package: what Debian compiles (with all that only those need), pip (sqlite-utils wants it for its own command
# line), zone data (Debian's tzdata), and what rich colours source code and Markdown with.
LEFT_OUT="aiohttp cryptography pip tzdata pygments markdown-it-py"

cache=.cache/deb
mkdir -p "$cache" dist
# one at a time: each clears away what another would have fetched at that moment
exec 9>"$cache/lock"
flock 9
stage=$(mktemp -d "$cache/stage.XXXXXX")
trap 'rm -rf "$stage"' EXIT INT TERM

# -- fetched, with hashes

prune=""
for name in $LEFT_OUT; do prune="$prune --prune $name"; done
.venv/bin/uv export --quiet --frozen --no-dev --no-emit-project --no-header $prune --output-file "$stage/requirements.txt"
wheels=$cache/wheels-$(sha256sum <"$stage/requirements.txt" | cut -c1-16)
if [ ! -d "$wheels" ]; then
    .venv/bin/python -m pip --quiet --disable-pip-version-check download --no-deps --require-hashes \
        --only-binary=:all: --platform any --implementation py --abi none --python-version 3.11 \
        --dest "$stage/fetched" --requirement "$stage/requirements.txt" || {
        echo "build-deb.sh: the libraries come from the Python package index, once: can this machine reach it?" >&2
        exit 1
    }
    rm -rf "$cache"/wheels-*
    mv -T "$stage/fetched" "$wheels"
fi

# -- the source tree of the package

source=$stage/edged
mkdir -p "$source/wheels"
for part in LICENSE README.md pyproject.toml docs edged examples firmware mappers packaging systemd; do
    cp -R "$part" "$source/$part"
done
find "$source" -name __pycache__ -prune -exec rm -rf {} +
mv "$source/packaging/debian" "$source/debian"
mv "$stage/requirements.txt" "$source/requirements.txt"
cp "$wheels"/*.whl "$source/wheels/"

released=$(dpkg-parsechangelog -l packaging/debian/changelog -S Version)
version=${VERSION:-$released}
SOURCE_DATE_EPOCH=$(dpkg-parsechangelog -l packaging/debian/changelog -S Timestamp)
export SOURCE_DATE_EPOCH
case $version in
    [0-9]*) ;;
    *) echo "build-deb.sh: VERSION=$version: a version begins with a digit" >&2; exit 2 ;;
esac
case $version in
    *[!0-9A-Za-z.+~]*) echo "build-deb.sh: VERSION=$version: allowed are letters, digits, '.', '+' and '~'" >&2; exit 2 ;;
esac
if [ "$version" != "$released" ]; then
    plain=$(echo "$version" | tr -d '~')
    sed -i "s/^version = \".*\"/version = \"$plain\"/" "$source/pyproject.toml"
    sed -i "s/^__version__ = \".*\"/__version__ = \"$plain\"/" "$source/edged/__init__.py"
    { printf 'edged (%s) unstable; urgency=medium\n\n  * Built as %s for a test.\n\n' "$version" "$version"
      printf ' -- %s  %s\n\n' "$(dpkg-parsechangelog -l packaging/debian/changelog -S Maintainer)" \
          "$(dpkg-parsechangelog -l packaging/debian/changelog -S Date)"
      cat packaging/debian/changelog; } >"$source/debian/changelog"
fi
python=$(pwd)/.venv/bin/python
(cd "$source" && "$python" -m hatchling build --target wheel --directory wheels >"$OLDPWD/$stage/wheel.log" 2>&1) ||
    { cat "$stage/wheel.log" >&2; exit 1; }

# -- built, without a network where that can be had

alone=""
if unshare --net true 2>/dev/null; then alone="unshare --net"; fi
(cd "$source" && $alone dpkg-buildpackage --build=binary --no-sign >"$OLDPWD/$stage/build.log" 2>&1) ||
    { cat "$stage/build.log" >&2; exit 1; }
mv "$stage/edged_${version}_all.deb" dist/
echo "dist/edged_${version}_all.deb: $(stat -c %s "dist/edged_${version}_all.deb") bytes"
