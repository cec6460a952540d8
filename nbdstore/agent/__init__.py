"""The agent: it attaches volumes on the machine where they are used, mounts them, keeps them alive.

It takes the lease, attaches, formats once, mounts, watches, reconnects, and detaches cleanly. It
talks to a server only through the control API and NBD, and runs on any host, or in a container with
CAP_SYS_ADMIN. It is never between an application and its data: killing it interrupts no I/O.

    agent            what can be asked: attach, detach, mount, umount, status
    api              the same over a unix socket
    records          what the agent has promised, on disk, written before it acts;   attachments
    attaching        from a volume to a device, and back, with the lease
    mounting         from a device to a mounted filesystem, and back;   repairs
    watch            connections that died, volumes that grew, while it runs
    doctor           what is wrong on this machine, why, and what helps
    life             the process, from its start to a clean stop;   local, first_process
    kernel_driver    the kernel's nbd driver, by netlink;   netlink, nbd_family
    fuse_driver      nbdfuse and a loop device, for kernels without nbd;   relay
    filesystems      format once, check, grow;   mounts, devices, programs
    store_server     the server: control API, leases, and connections that have shaken hands
"""
