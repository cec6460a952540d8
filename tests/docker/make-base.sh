#!/bin/sh
# Make the root file system of a minimal container of this machine's distribution, as a tar archive.
#
#   make-base.sh ARCHIVE WORK AUTHORITIES
#
# Run in a mount namespace of its own: WORK becomes a file system in memory, where the hundreds of
# syncs of a package manager take no time.
set -eu
archive=$1
work=$2
authorities=$3
. /etc/os-release
case $ID in
ubuntu) components=main,universe ;;
*) components=main ;;
esac
mount -t tmpfs tmpfs "$work"
# What the slim images of Debian leave out, too.
exclude=
for directory in doc info locale man; do
    exclude="$exclude --dpkgopt=path-exclude=/usr/share/$directory/*"
done
# shellcheck disable=SC2086  # the options are words
TMPDIR=$work exec mmdebstrap --quiet --variant=minbase --include=ca-certificates \
    --hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr \
    --components="$components" --aptopt='APT::Sandbox::User "root"' $exclude \
    --customize-hook="upload $authorities $authorities" "$VERSION_CODENAME" "$archive"
