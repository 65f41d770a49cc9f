"""What callers are told when something cannot be done. Named for what to do next."""

from __future__ import annotations


class ReconcilerError(Exception):
    """The base of all errors of this package, but for wrong arguments (ValueError)."""


class InvalidRequestError(ReconcilerError, ValueError):
    """An argument that makes no sense. Nothing was changed."""


class NoSuchSessionError(ReconcilerError):
    """Nothing of that session is there."""


class NotKeptError(ReconcilerError):
    """What that session was started with was not kept: stop it, and spawn it anew."""


class AlreadyRunningError(ReconcilerError):
    """A keeper for that session lives. Stop it, or use another session id."""


class AgentNotFoundError(ReconcilerError):
    """The agent's program cannot be started: install it, or name another one."""


class AgentExitedError(ReconcilerError):
    """The agent ended within 300 ms of its start."""


class KeeperStartError(ReconcilerError):
    """The keeper did not come up, and nothing of it is left."""


class FolderError(ReconcilerError):
    """The sessions folder cannot be used."""


class FolderLockedError(FolderError):
    """Another reconciler works on the sessions folder."""


class UnverifiableError(ReconcilerError):
    """It cannot be proven whose the process or the file is, so nothing was done."""


class StillAliveError(ReconcilerError):
    """A process outlived SIGKILL (it hangs in the kernel). Its files were left alone."""
