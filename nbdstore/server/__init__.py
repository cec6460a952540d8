"""The NBD server: asyncio around `nbdstore.protocol`, serving the volumes of `nbdstore.store`.

options      what a server is told: addresses, TLS, limits
server       the whole: start, drain, who is connected
listener     addresses and accepting
connection   one connection's life
session      one client's transmission phase; the hot path
reads        the READs of a round, answered together or by themselves
gathering    small writes of several clients, by one call of the store
turns        steps that are put off to the loop's next turn
limiter      requests wait for the limits of their volume
stall        what a client is that does not get on
budget       what all connections may hold together
wakefulness  whether the loop may sleep after a reply
meter        how fast a connection's counters grow
counters     what the metrics tell of each volume
commands     the commands that may have to wait
channel      a client's socket
tls_channel  the same under TLS
exports      which volumes a client may see
tls          contexts and certificate names
"""

from nbdstore.protocol.agreement import TlsMode
from nbdstore.server.connection import ConnectionInfo
from nbdstore.server.exports import HasVolumes
from nbdstore.server.options import DEFAULT_PORT, Limits, ServerOptions, TlsOptions
from nbdstore.server.server import Server

__all__ = [
    "DEFAULT_PORT",
    "ConnectionInfo",
    "HasVolumes",
    "Limits",
    "Server",
    "ServerOptions",
    "TlsMode",
    "TlsOptions",
]
