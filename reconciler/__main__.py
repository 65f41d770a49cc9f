"""``python -m reconciler`` is ``pi-reconciler``."""

from reconciler.cli import main

if __name__ == "__main__":
    main()
