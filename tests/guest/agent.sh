# The guest's first process after init.sh: runs the scripts that the host sends.
#
# The channel is a virtio port. A request is a line: a token, and the script in base64. The reply
# is all that the script writes, then a line: the token, and the script's exit status. Scripts run
# in the host's /bin/sh with the host's programs: "sh" alone would be busybox, and so would "head".

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
cd /tmp || exit
# The driver makes the port's file once the host has told it of the port.
until [ -c /dev/vport*p1 ]; do /run/guest/busybox usleep 20000; done
exec 3<>"$(echo /dev/vport*p1)"

echo ready >&3
while read -r token script <&3; do
    echo "$script" | base64 -d >/run/guest/script
    /bin/sh /run/guest/script </dev/null >&3 2>&1 3>&-
    echo "$token $?" >&3
done

# The host has closed the channel. A first process must not end.
exec /run/guest/busybox poweroff -f
