"""The control API: change and look at a pool while a server holds it.

::

    commands (CLI) --- VolumeService ---+-- client.ControlClient --HTTP--> api --+
                     (service.py)       |                                        v
                                        +-- a pool opened for the moment --> operations --> pool

``operations`` says what can be done to an open pool, once; ``api`` offers it over HTTP + JSON and
``client`` calls it from other processes and hosts. This package imports neither the server nor
the CLI: it meets the pool and the connections through the types in ``contracts``.
"""

SOCKET_NAME = "control.sock"
"""The unix socket in a pool's directory where the server that holds the pool answers."""
