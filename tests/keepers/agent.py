"""An agent for tests: writes what it reads from its standard input to a file, byte for byte.

Usage: agent.py RECORD [--slow BYTES SECONDS] [--survive] [--deaf]

RECORD is made before the first read. ``--slow``: at most BYTES at a time, with a rest after
each. ``--survive``: the keeper's death does not kill it, so that all is read that ever got
into the pipe. ``--deaf``: it closes its standard input, and lives on. At the end of its
input it renames RECORD to RECORD.ended.
"""

import os
import signal
import sys
import time

record, *options = sys.argv[1:]
size, rest = 1 << 16, 0.0
if "--slow" in options:
    at = options.index("--slow")
    size, rest = int(options[at + 1]), float(options[at + 2])
if "--survive" in options:
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, ctypes.c_ulong(0))
if "--deaf" in options:
    os.close(0)
out = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
if "--deaf" in options:
    signal.pause()
while piece := os.read(0, size):
    view = memoryview(piece)
    while view:
        view = view[os.write(out, view) :]
    if rest:
        time.sleep(rest)
os.rename(record, record + ".ended")
