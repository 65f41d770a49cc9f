"""The folder that is served now: what looks at it, what acts on it, and whether that may be."""

from __future__ import annotations

from collections.abc import Callable

from reconciler.control import Control
from reconciler.effects import Effects
from reconciler.folder import Folder
from reconciler.keeper import KeeperManager


class Served:
    """A folder, and what goes with it. Close it when another one stands in its place.

    Args:
        folder: the folder, open.
        manager: says how its sessions are looked at and ended.
        complain: called once for each state of the spawn registry that is not usable.
        control: tells others about it once its lock is held, if anything does.

    Attributes:
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
    ) -> None:
        self.folder = folder
        self._complain = complain
        self.go_by(manager)
        self.why_not = "not locked"
        self.locked_by_other = False
        self._locked = False
        self._control = control

    def go_by(self, manager: KeeperManager) -> None:
        """Look at the sessions, and end them, as a manager of the same folder says."""
        self.probe = manager.probe(self.folder, self._complain)
        self.effects = Effects(self.probe, manager.ladder)

    def close(self) -> None:
        """Let go of the folder, and of its lock."""
        if self._control is not None:
            self._control.close()
        self.folder.close()

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
