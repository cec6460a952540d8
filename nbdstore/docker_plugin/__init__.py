"""The volume plugin for Docker: it makes volumes for containers and has the agent mount them.

It speaks Docker's volume plugin protocol (which Podman speaks, too) on a unix socket, the control
API to the server, and asks the agent of its machine. It holds no data and no connection: killing it
disturbs no container.

    options    what `docker volume create -o` may say
    records    what Docker was promised, on disk: volumes, and which containers use them
    driver     what is asked: create, remove, mount, unmount, list
    turns      one thing at a time for each volume, and none longer than Docker waits
    server     the protocol
"""
