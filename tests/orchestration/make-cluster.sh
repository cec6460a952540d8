#!/bin/bash
# Make the programs of a Kubernetes control plane from Debian's sources, which Debian only makes
# the client of: kube-apiserver and kube-controller-manager. As root; some minutes on two cores.
#
#   make-cluster.sh DIRECTORY     where they are put, if they are not there
set -euo pipefail
directory=$1
programs="kube-apiserver kube-controller-manager"
for program in $programs; do
    [ -x "$directory/$program" ] || missing=yes
done
if [ -z "${missing:-}" ] && command -v etcd >/dev/null; then
    exit 0
fi
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \
    dpkg-dev etcd-server golang-go jq make rsync
[ -n "${missing:-}" ] || exit 0

work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
# The machine's own package sources, for sources.
mkdir -p "$work/parts" "$work/lists/partial"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/{debian,ubuntu}.sources; do
    [ ! -f "$file" ] || sed -e 's/^Types:.*/Types: deb-src/' -e 's/^deb /deb-src /' "$file" \
        >"$work/parts/${file##*/}"
done
[ ! -f "$work/parts/sources.list" ] || mv "$work/parts/sources.list" "$work/parts/machine.list"
options=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/parts"
    -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root)
cd "$work"
apt-get "${options[@]}" update --quiet=2
apt-get "${options[@]}" source --quiet=2 kubernetes
cd kubernetes-*/
mkdir -p .go/src/k8s.io
ln -s ../../.. .go/src/k8s.io/kubernetes
version=$(dpkg-parsechangelog --show-field Version | sed -e 's/.*really//' -e 's/-.*//')
export GOPATH=$PWD/.go GOCACHE=$work/cache HOME=$work CGO_ENABLED=0
export KUBE_GIT_VERSION=v$version KUBE_GIT_TREE_STATE=clean KUBE_GIT_COMMIT=debian
make WHAT="$(printf 'cmd/%s ' $programs)"
mkdir -p "$directory"
for program in $programs; do
    install "_output/bin/$program" "$directory/"
done
