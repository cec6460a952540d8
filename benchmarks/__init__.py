"""How fast nbdstore is, beside the C servers: measured in one run, in turns, on the same disk.

    model       what a row, a stage and a sample are
    scale       how large and how long: smoke, quick, normal, full
    rows        every row: its question, its goal, how it is measured (fio/ has the jobs)
    server      the life of a server under measurement; peers: the five of them
    fio, copying, source_tree, opening, recovery    one way of measuring each
    bed         disks and servers of one stage; rounds: all rows, all rounds, in turns
    results     what was measured, as JSON; report and plots: the same for people
    machine     where it was measured
    cli         the command line, `python -m benchmarks`

README.md says how to run it and how to read it.
"""
