"""How many descriptors this process may have, and what it must not pass on.

A daemon takes two for each session, and so all that it may have. But programs that use
``select`` break above 1024, which is why that is what every program is given: keepers, and the
agents below them, are to have what the daemon was given, not what it took.
"""

from __future__ import annotations

import contextlib

_given: int | None = None
"""The soft limit before it was raised; None: it was not."""


def raise_limit() -> None:
    """Take as many descriptors as the system allows."""
    import resource  # noqa: PLC0415 - Windows has none

    global _given  # noqa: PLW0603 - as the limit, it is the process's
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # where "no limit" is more than allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if _given is None and soft != hard:
            _given = soft


def given_limit() -> int | None:
    """The soft limit that a child is to have; None: the one that it inherits."""
    return _given
