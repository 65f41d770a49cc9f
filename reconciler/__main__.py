"""``python -m reconciler`` is ``pi-reconciler``."""

import gc

gc.disable()  # what a command imports is no garbage; `run`, which lasts, enables it again
from reconciler.cli import main  # noqa: E402 - that is what it is for

if __name__ == "__main__":
    main()
