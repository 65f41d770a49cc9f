"""Does the sleeper that bounds are held against notice that a machine stands still?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SLEEPER = """
import sys
from lateness import lateness
with lateness() as late:
    print("up", flush=True)
    sys.stdin.readline()
    print(late())
"""


def test_who_stands_still_is_late_by_that() -> None:
    command = [sys.executable, "-c", SLEEPER]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        command, env=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sleeper:
        assert sleeper.stdin is not None
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "up\n"
        sleeper.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        time.sleep(0.3)  # what it is to be late by
        sleeper.send_signal(signal.SIGCONT)
        sleeper.stdin.write("\n")
        sleeper.stdin.flush()
        assert float(sleeper.stdout.readline()) > 0.25
