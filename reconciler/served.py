"""The folder that is served now: what looks at it, what acts on it, and whether that may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reconciler.control import Control
from reconciler.effects import Effects
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager
from reconciler.reports import Log

_NO_FOLDER = "there is no folder"


class Served:
    """A folder, and what goes with it. Close it when another one stands in its place.

    Args:
        folder: the folder, open.
        manager: says how its sessions are looked at, judged, started and ended.
        complain: called once for each state of the spawn registry that is not usable.
        control: tells others about it once its lock is held, if anything does.
        dry_run: never act upon it.

    Attributes:
        manager: says how its sessions are looked at, judged, started and ended.
        probe: looks at its sessions.
        effects: acts on them.
        why_not: why it must not be acted upon, as of the last full look; or nothing.
        locked_by_other: another reconciler works on it.
    """

    def __init__(
        self,
        folder: Folder,
        manager: KeeperManager,
        complain: Callable[[str], None],
        control: Control | None = None,
        *,
        dry_run: bool = False,
    ) -> None:
        self.folder = folder
        self._complain = complain
        self.go_by(manager)
        self.why_not = "dry run" if dry_run else "not locked"
        self.locked_by_other = False
        self._locked = False
        self._control = control

    def go_by(self, manager: KeeperManager) -> None:
        """Look at the sessions, and end them, as a manager of the same folder says."""
        self.manager = manager
        self.probe = manager.probe(self.folder, self._complain)
        self.effects = Effects(self.probe, manager.ladder)

    def close(self) -> None:
        """Let go of the folder, and of its lock."""
        if self._control is not None:
            self._control.close()
        self.folder.close()
        self.why_not = _NO_FOLDER

    def may_not_act(self) -> str:
        """Why the folder must be left alone now, or nothing: its mode may have changed."""
        return self.why_not or self.folder.distrust_itself()

    def take_lock(self) -> None:
        """Become the one who acts on the folder, if it is free and as long as it is trusted."""
        if distrust := self.folder.distrust():
            self.why_not = distrust
        elif self.why_not:
            self._locked = self.folder.lock()
            self.locked_by_other = not self._locked
            holder = self.folder.lock_holder() if self.locked_by_other else None
            self.why_not = (
                f"another reconciler (process {holder or 'unknown'}) works on "
                f"{str(self.folder.path)!r}: stop it first, or look on (dry_run, --dry-run)"
                if self.locked_by_other
                else ""
            )
        if self._locked and self._control is not None:
            self._control.serve(self.folder, self.may_not_act)


class Holder:
    """Holds the folder that the path leads to, if any, and says what is wrong with it.

    Args:
        log: where it is said.
        control: tells others about the folder, if anything does.
        dry_run: take no lock, and never act.

    Attributes:
        served: the folder; None while there is none.
        trouble: why it cannot be looked at, or not be acted upon, as of the last full look.
            Empty when all is well, and while there is no folder.
    """

    def __init__(self, log: Log, control: Control | None, *, dry_run: bool) -> None:
        self._log = log
        self._control = control
        self._dry_run = dry_run
        self.served: Served | None = None
        self.trouble = ""

    def close(self) -> None:
        """Let go of the folder, and of its lock."""
        if self.served is not None:
            self.served.close()
            self.served = None

    def may_not_act(self) -> str:
        """Why nothing may be acted upon now, or nothing."""
        return self.served.may_not_act() if self.served is not None else _NO_FOLDER

    def has_lost(self) -> bool:
        """Whether the folder has gone, or another one stands in its place. It is let go of then."""
        if self.served is None or self.served.folder.in_place():
            return False
        self._log.warning("folder.gone", folder=str(self.served.folder.path))
        self.close()
        self.trouble = ""
        return True

    def hold(self, manager: KeeperManager) -> Served | None:
        """Hold the folder of a manager, and its lock, if it is there and can be opened.

        Raises:
            OSError: the system refused, once it was open.
        """
        if self.served is None and (folder := self._open(manager.sessions_dir)) is not None:
            self.served = Served(
                folder, manager, self._on_registry, self._control, dry_run=self._dry_run
            )
        if self.served is not None and not self._dry_run:
            self.served.take_lock()
        return self.served

    def _open(self, path: Path) -> Folder | None:
        try:
            return Folder(path)
        except FileNotFoundError:
            self.trouble = ""
        except OSError as error:
            self._complain("folder.unusable", path, f"cannot be opened: {error.strerror}")
        return None

    def check(self, manager: KeeperManager) -> Served | None:
        """Hold the folder, and say what is wrong with it; None if it cannot be looked at."""
        path = manager.sessions_dir
        try:
            served = self.hold(manager)
            if served is None:
                return None
            if served.folder.closed_to_us():
                self._complain("folder.unusable", path, "cannot be read: Permission denied")
                return None
        except OSError as error:
            self._complain("folder.unusable", path, f"cannot be read: {error.strerror}")
            return None
        why_not = "" if self._dry_run else served.why_not
        self._complain("folder.observed_only", path, why_not)
        return served

    def _complain(self, event: str, path: Path, reason: str) -> None:
        """Say what is wrong with the folder, once for each reason."""
        if reason and reason != self.trouble:
            self._log.warning(event, folder=str(path), reason=reason)
        self.trouble = reason

    def _on_registry(self, reason: str) -> None:
        self._log.warning("registry.unusable", reason=reason)
