#!/bin/sh
# Puts packages into a signed apt repository: a folder that any static web server can serve.
#   packaging/apt-repo.sh                  the package of packaging/debian/changelog (or VERSION=...) from dist into dist/apt
#   packaging/apt-repo.sh FOLDER DEB...    these into FOLDER
# What lies in the folder stays, so that nodes find the version that they go back to. Signed with the key that EDGED_APT_KEY
# names (an id or a fingerprint in gpg's own keyring); without it with a throw-away key, which is for tests.
# EDGED_APT_VALID_DAYS=30: nodes refuse the list after so many days, so that nobody can show them an old one for ever; the
# repository must then be signed again in time.
set -eu
umask 022
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8
EARLIER_LISTS=15

folder=${1:-dist/apt}
if [ $# -gt 1 ]; then
    shift
else
    set -- "dist/edged_${VERSION:-$(dpkg-parsechangelog -l packaging/debian/changelog -S Version)}_all.deb"
fi
for deb in "$@"; do
    [ -f "$deb" ] || { echo "apt-repo.sh: $deb is not there; build it with: make deb" >&2; exit 1; }
done

work=$(mktemp -d)
trap 'gpgconf --homedir "$work" --kill all 2>/dev/null || :; rm -rf "$work"' EXIT INT TERM
if [ -n "${EDGED_APT_KEY:-}" ]; then
    sign() { gpg --batch --yes --local-user "$EDGED_APT_KEY" "$@"; }
else
    # kept as a file: gpg's own folder must have a short path
    spare=.cache/apt-key.asc
    spare() { gpg --homedir "$work" --quiet --batch --yes --pinentry-mode loopback --passphrase '' "$@"; }
    if [ ! -s "$spare" ]; then
        mkdir -p .cache
        spare --quick-generate-key 'edged throw-away key, for tests only' ed25519 sign never 2>/dev/null
        (umask 077 && spare --armor --export-secret-keys >"$spare.tmp")
        mv "$spare.tmp" "$spare"
    else
        spare --import "$spare" 2>/dev/null
    fi
    sign() { spare "$@"; }
fi

mkdir -p "$folder"
for deb in "$@"; do
    target=$folder/$(basename "$deb")
    if [ -e "$target" ] && ! cmp -s "$deb" "$target" && [ -n "${EDGED_APT_KEY:-}" ]; then
        echo "apt-repo.sh: $target is published with other bytes; a version is published once: give this one a higher number" >&2
        exit 1
    fi
    cp "$deb" "$target.tmp"
    mv "$target.tmp" "$target"
done

# The signed list is replaced last, by renaming. It names the index by its digest, and an index that an earlier one named stays:
# a node that reads in between, or has read the list before, gets what belongs to it.
archive() { apt-ftparchive -o APT::FTPArchive::MD5=false -o APT::FTPArchive::SHA1=false "$@"; }
(cd "$folder" && archive packages .) >"$work/Packages"
gzip -9n <"$work/Packages" >"$work/Packages.gz"
mkdir "$work/list"
mv "$work/Packages" "$work/Packages.gz" "$work/list"
archive -o APT::FTPArchive::Release::Origin=edged -o APT::FTPArchive::Release::Label=edged \
    -o APT::FTPArchive::Release::Suite=stable -o APT::FTPArchive::Release::Architectures=all \
    -o APT::FTPArchive::Release::Acquire-By-Hash=yes \
    release "$work/list" >"$work/Release"
if [ -n "${EDGED_APT_VALID_DAYS:-}" ]; then
    sed -i "s/^Date: .*/&\nValid-Until: $(date -u -R -d "+$EDGED_APT_VALID_DAYS days")/" "$work/Release"
fi
sign --clear-sign --digest-algo SHA512 --output "$work/InRelease" "$work/Release"
sign --armor --export ${EDGED_APT_KEY:+"$EDGED_APT_KEY"} >"$work/edged.asc"
for bits in 256 512; do # apt asks by the strongest that the list has
    mkdir -p "$folder/by-hash/SHA$bits"
    for file in Packages Packages.gz; do
        named=$folder/by-hash/SHA$bits/$("sha${bits}sum" "$work/list/$file" | cut -d ' ' -f 1)
        cp "$work/list/$file" "$named.tmp"
        mv "$named.tmp" "$named"
    done
    # this list's two files are the newest; of earlier lists the last stay. The names are digests
    # shellcheck disable=SC2012
    ls -1t "$folder/by-hash/SHA$bits" | tail -n +$((2 * EARLIER_LISTS + 3)) | while IFS= read -r old; do
        rm -f "$folder/by-hash/SHA$bits/$old"
    done
done
for file in edged.asc list/Packages list/Packages.gz Release InRelease; do
    name=$(basename "$file")
    cp "$work/$file" "$folder/$name.tmp"
    mv "$folder/$name.tmp" "$folder/$name"
done

echo "$folder: $(grep -c '^Package: edged$' "$folder/Packages") versions of edged"
[ -n "${EDGED_APT_KEY:-}" ] || echo "signed with a throw-away key (.cache/apt-key.asc), for tests only; set EDGED_APT_KEY to sign with yours"
