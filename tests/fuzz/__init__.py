"""Coverage-guided fuzzing of the protocol: whatever bytes come, every promise holds.

    program      turns an input's bytes into choices: names, numbers, messages
    cutting      ways to cut a stream into pieces
    options      target: the server's option phase
    requests     target: the server's request parser, beside a simple one that is obviously right
    replies      target: the client's reply parser, fed by a hostile server
    sessions     target: the whole server over a socketpair, with a pool in memory
    targets      all of them by name
    guided       one target under atheris (libFuzzer), in a process of its own
    __main__     ``python -m tests.fuzz --seed N --minutes M``: all targets, and what to do about a
                 crash
    corpus/      inputs that reach everything that was ever reached, kept small; replayed by pytest

An input is a program for a client or a server, not a stream: mutations of it stay meaningful. A
target is a function of bytes; it raises if a promise is broken.
"""
