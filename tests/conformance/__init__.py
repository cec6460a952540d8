"""A conformance client for NBD servers: ``python -m tests.conformance nbd://HOST:PORT/EXPORT``.

Speaks NBD over raw sockets to any server, breaks its rules where a well-behaved client could not,
and tells what the server does right, wrong, differently or not at all. Needs nothing but Python's
standard library; README.md tells how to use it.

    wire         every number and layout of the protocol, read from the specification once more
    outcome      what can come of a case
    target       URIs, and how to reach what they name
    connection   a socket on which nothing waits for ever
    handshake    the client's side of the option phase
    session      the client's side of the transmission phase; a reply that breaks a rule ends it
    server       the server under test: its connections, and what it offers
    case         what a case is, and the table of all of them
    cases/       the cases, by phase
    runner       runs cases, each with a deadline
    report       tells what came of them
    expected     what is known of a server beforehand

Knows nothing of the server that lives in this repository.
"""
