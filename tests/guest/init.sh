#!/bin/busybox sh
# The guest's first process: make the host's root its own, and become agent.sh there.
#
# The host's root comes read-only over 9p; an overlay in memory takes what the guest writes.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/null >/dev/console 2>&1

die() {
    echo "init.sh: $*"
    poweroff -f
}

while read -r module; do
    insmod "/modules/$module" || die "cannot load $module"
done </modules/load-order

# A 9p mount with cache=loose trusts what it has read: what the host changes later is not seen.
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /lower ||
    die "cannot mount the host's root"
mount -t tmpfs -o mode=755,size=80% tmpfs /upper
mkdir /upper/changes /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work overlay /root ||
    die "cannot put an overlay on the host's root"

mount -t tmpfs -o mode=755 tmpfs /root/run
mkdir /root/run/guest /root/run/lock
cp /agent.sh /bin/busybox /root/run/guest
for directory in proc sys dev; do
    mount --move "/$directory" "/root/$directory"
done

# The addresses are those of QEMU's user network; the host's 127.0.0.1 is 10.0.2.2.
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0

exec switch_root /root /run/guest/busybox sh /run/guest/agent.sh
