"""The GPU table: every row measured beside its floor and rivals on one device, results kept as they come.

    fastsae bench --device cuda --out DIR            the whole table
    python -m bench.gpu --device cpu --quick         the same code on small shapes, anywhere

Kernel time by CUDA events around as many calls as make a millisecond; ours, the floor and the rivals alternate; median of at least 5 rounds
after a warm-up, with min and max. Inputs are random, and as many sets of them rotate as pass the L2 cache four times over. A result that
its specification refuses is reported and not timed. After each row the JSON is written anew: what was measured survives a kill.
Rows whose backend is missing say why, in place of a time. On a GPU the rows run in a process of their own (``supervise``): one that
crashes, hangs or leaves the device broken is noted, and the others go on in a new process.

    rows/        what is measured, a file a family      harness    how one row is measured
    table        all rows, in order of importance       supervise  rows that take their process with them
"""
