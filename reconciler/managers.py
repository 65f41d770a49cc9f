"""The service managers that are known: systemd's for a user, and macOS's launchd.

What they would have to do is a list of steps, made from what there is now.
"""

from __future__ import annotations

import os
import plistlib
import pwd
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from reconciler.errors import InvalidRequestError
from reconciler.service import (
    Remove,
    Run,
    Running,
    ServiceError,
    Status,
    Step,
    Wanted,
    Write,
    ask,
    refuse_foreign,
    signed,
    template,
    text_of,
)

UNIT: Final = "pi-reconciler.service"
HARDENED: Final = "hardened.conf"
LABEL: Final = "io.github.pi-reconciler"

_EXEC_START: Final = re.compile(r"^ExecStart=.*$", re.MULTILINE)


class Manager(Protocol):
    """A service manager."""

    def install(self, wanted: Wanted, *, force: bool) -> list[Step]:
        """What is to be done until it is installed, as wanted, and runs."""

    def uninstall(self, *, force: bool) -> list[Step]:
        """What is to be done until it is gone; nothing, if it is."""

    def status(self) -> Status:
        """What the manager says of it."""


def manager(environ: Mapping[str, str], home: Path, platform: str = sys.platform) -> Manager:
    """The service manager of this system.

    Raises:
        ServiceError: none is known here.
    """
    if platform == "linux":
        return Systemd(environ, home)
    if platform == "darwin":
        return Launchd(home)
    raise ServiceError(f"no service manager is known on {platform}: use pi-reconciler run")


# -- systemd -------------------------------------------------------------------------------


class Systemd:
    """systemd's manager of one user.

    Args:
        environ: says where the user's units are.
        home: the user's home folder.
    """

    def __init__(self, environ: Mapping[str, str], home: Path) -> None:
        chosen = environ.get("XDG_CONFIG_HOME", "").strip()
        folder = (Path(chosen) if chosen else home / ".config") / "systemd" / "user"
        self.unit = folder / UNIT
        self.hardened = folder / f"{UNIT}.d" / HARDENED

    def install(self, wanted: Wanted, *, force: bool) -> list[Step]:
        """What is to be done until it is installed, as wanted, and runs.

        Raises:
            ServiceError: there is a unit that `install` did not write.
        """
        files = [self.unit, self.hardened]
        refuse_foreign(files, force=force)
        texts = {self.unit: signed(unit_text(wanted.command))}
        if wanted.hardened:
            texts[self.hardened] = signed(template(HARDENED))
        changes: list[Step] = [Write(p, text) for p, text in texts.items() if text_of(p) != text]
        changes += [Remove(path) for path in files if path not in texts and path.exists()]
        # The program may be a new one, or an install have failed half-way: always restart.
        return [
            *_systemctl(("show", "--property", "Version")),  # before anything is written
            *changes,
            *_systemctl(("daemon-reload",), ("enable", UNIT), ("restart", UNIT)),
        ]

    def uninstall(self, *, force: bool) -> list[Step]:
        """What is to be done until it is gone; nothing, if it is.

        Raises:
            ServiceError: there is a unit that `install` did not write.
        """
        files = [path for path in (self.unit, self.hardened) if os.path.lexists(path)]
        if not files:
            return []
        refuse_foreign(files, force=force)
        disable = Run(("systemctl", "--user", "disable", "--now", UNIT), may_fail=force)
        reload = Run(("systemctl", "--user", "daemon-reload"), may_fail=force)
        return [disable, *map(Remove, files), reload]

    def status(self) -> Status:
        """What the manager says of it."""
        names = "LoadState,ActiveState,SubState,MainPID,StatusText,ActiveEnterTimestamp"
        names += ",ActiveEnterTimestampMonotonic,UnitFileState,FragmentPath,NRestarts"
        try:
            done = ask(("systemctl", "--user", "show", UNIT, "--property", names))
        except ServiceError as error:
            return Status(Running.NOT_KNOWN, str(error))
        if done.returncode:
            return Status(Running.NOT_KNOWN, done.stderr.strip())
        told = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        began = told.pop("ActiveEnterTimestampMonotonic", "")
        if (load := told.get("LoadState", "no answer")) != "loaded":
            return Status(Running.NOT_KNOWN, f"systemd has no unit {UNIT}: {load}", told=told)
        if (state := told.get("ActiveState", "no answer")) not in {"active", "reloading"}:
            return Status(Running.NO, f"systemd says: {state}", told=told)
        uptime = time.monotonic() - int(began) / 1e6 if began.isdecimal() else None
        return Status(Running.YES, "", _pid(told.get("MainPID")), uptime, told)


def _pid(text: str | None) -> int | None:
    return int(text) or None if text and text.isdecimal() else None


def lingers(uid: int, folder: Path = Path("/var/lib/systemd/linger")) -> bool:
    """Whether a user's services run while that one is logged out."""
    try:
        return (folder / pwd.getpwuid(uid).pw_name).exists()
    except KeyError:  # a user without a name
        return False


def unit_text(command: Sequence[str]) -> str:
    """The unit, for a command."""
    program, *words = command
    line = " ".join((systemd_program(program), *map(systemd_word, words)))
    return _EXEC_START.sub(lambda _: f"ExecStart={line}", template(UNIT))


def systemd_program(path: str) -> str:
    """The path of a command's program as a unit has it: a variable is none in there anyway.

    Raises:
        InvalidRequestError: systemd runs nothing that is called so.
    """
    if not path.isprintable() or not {"'", '"', "\\"}.isdisjoint(path):
        raise InvalidRequestError(
            f"systemd cannot run {path!r}, for its quotes or backslashes: install pi-reconciler "
            "somewhere else"
        )
    return systemd_word(path).replace("$$", "$")


def systemd_word(word: str) -> str:
    """A word of a command as a unit has it: specifiers and variables are none.

    Raises:
        InvalidRequestError: it holds what no unit can say.
    """
    if not word.isprintable():
        raise InvalidRequestError(f"{word!r} cannot stand in a unit")
    text = word.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return text if re.fullmatch(r"[\w@%+=:,./-]+", word) else f'"{text}"'


def _systemctl(*commands: tuple[str, ...]) -> Iterator[Run]:
    for command in commands:
        yield Run(("systemctl", "--user", *command))


# -- launchd ---------------------------------------------------------------------------------


class Launchd:
    """macOS's launchd, for one user that is logged in. Written for it, and not run there yet.

    Args:
        home: the user's home folder.
        uid: the user's id.
    """

    def __init__(self, home: Path, uid: int | None = None) -> None:
        self.plist = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self._logs = home / "Library" / "Logs"
        self._domain = f"gui/{os.getuid() if uid is None else uid}"

    def install(self, wanted: Wanted, *, force: bool) -> list[Step]:
        """What is to be done until it is installed, as wanted, and runs.

        Raises:
            ServiceError: there is an agent that `install` did not write.
            InvalidRequestError: it should be hardened, which launchd cannot do.
        """
        if wanted.hardened:
            raise InvalidRequestError("--hardened is for systemd: launchd has nothing like it")
        refuse_foreign([self.plist], force=force)
        text = signed(plist_text(wanted.command, self._logs))
        service = f"{self._domain}/{LABEL}"
        asked = Run(("launchctl", "print", self._domain))  # before anything is written
        if text_of(self.plist) == text:  # bootstrap fails for one that is loaded
            return [
                asked,
                Run(("launchctl", "bootstrap", self._domain, str(self.plist)), may_fail=True),
                Run(("launchctl", "kickstart", "-k", service)),
            ]
        return [
            asked,
            Run(("launchctl", "bootout", service), may_fail=True),
            Write(self.plist, text),
            Run(("launchctl", "enable", service)),
            Run(("launchctl", "bootstrap", self._domain, str(self.plist))),
        ]

    def uninstall(self, *, force: bool) -> list[Step]:
        """What is to be done until it is gone; nothing, if it is.

        Raises:
            ServiceError: there is an agent that `install` did not write.
        """
        if not os.path.lexists(self.plist):
            return []
        refuse_foreign([self.plist], force=force)
        out = Run(("launchctl", "bootout", f"{self._domain}/{LABEL}"), may_fail=True)
        return [out, Remove(self.plist)]

    def status(self) -> Status:
        """What the manager says of it."""
        try:
            done = ask(("launchctl", "print", f"{self._domain}/{LABEL}"))
        except ServiceError as error:
            return Status(Running.NOT_KNOWN, str(error))
        if done.returncode:
            known = self.plist.exists()
            return Status(Running.NO if known else Running.NOT_KNOWN, done.stderr.strip())
        told = dict(re.findall(r"^\t(state|pid|program|path) = (.*)$", done.stdout, re.MULTILINE))
        if told.get("state") != "running":
            return Status(Running.NO, f"launchd says: {told.get('state', 'no state')}", told=told)
        return Status(Running.YES, "", _pid(told.get("pid")), told=told)


def plist_text(command: Sequence[str], logs: Path) -> str:
    """The launchd agent, for a command; its logs go to that folder."""
    agent = plistlib.loads(template(f"{LABEL}.plist").encode())
    agent["ProgramArguments"] = list(command)
    agent["StandardOutPath"] = str(logs / "pi-reconciler.log")
    agent["StandardErrorPath"] = str(logs / "pi-reconciler.err")
    return plistlib.dumps(agent, sort_keys=False).decode()
