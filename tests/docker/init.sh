#!/bin/sh
# The first process of a machine of tests/docker/machine.py: makes its mounts, reaps its orphans.
set -eu
# Plugins and the state of a Docker engine: not the real machine's.
mkdir -p /run/docker
mount -t tmpfs tmpfs /run/docker
# Mounts made here are shared by whoever is started here, and are still not seen outside.
mount --make-rshared /
ip link set lo up
echo ready
# While a shell waits for its own child, it reaps every orphan that has become its child.
trap 'exit 0' TERM
while :; do
    sleep 3600 &
    wait $! || :
done
