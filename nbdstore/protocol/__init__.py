"""NBD as pure functions and state machines: bytes in, bytes out.

    constants      every number and layout of the specification
    agreement      what a server offers, and what a handshake agrees on
    options        the data inside options and option replies
    contexts       metadata contexts and the queries for them
    handshake      the server's option phase
    rules          what a request may ask, and which error each fault gets
    transmission   the server's request parser
    replies        simple, structured and extended replies
    client         the other side: for tests and tools

No asyncio, no sockets, no numpy, and nothing of the store.
"""
