"""``python -m reconciler`` is ``pi-reconciler``."""

import gc
import signal
import sys

gc.disable()  # what a command imports is no garbage; `run`, which lasts, enables it again
if sys.platform != "win32":  # it would end a `run` that is told to reload before it can
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
from reconciler.cli import main  # noqa: E402 - that is what it is for

if __name__ == "__main__":
    main()
