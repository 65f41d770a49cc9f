"""The background process as a service of its user: a systemd user unit, or a launchd agent.

What is to be done is a list of steps, made from what there is, so that it can be shown before
anything is done. The units' texts are files of this package (``units``).
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Final

from reconciler.errors import ReconcilerError

PATIENCE: Final = 60.0
"""Seconds that the service manager may take for one command."""

_NO_MANAGER: Final = (
    " (no systemd of your user runs here: log in, not by su; or use pi-reconciler run)"
)

_MARK: Final = "Written by pi-reconciler service install. SHA-256 of the other lines: "
_MARKED: Final = re.compile(rf"^.*{re.escape(_MARK)}([0-9a-f]{{64}}).*\n", re.MULTILINE)


class ServiceError(ReconcilerError):
    """The service manager could not do what it was asked for."""


class Running(enum.Enum):
    """Whether a service runs; the values are systemctl's exit codes for ``status``."""

    YES = 0
    NO = 3
    NOT_KNOWN = 4


@dataclass(frozen=True, slots=True)
class Status:
    """What the service manager says.

    Attributes:
        running: whether it runs.
        reason: why it is not known to run; empty when it runs.
        pid: its process, where that is known.
        uptime: seconds since it was started, where that is known.
        told: what else it says, by its own names.
    """

    running: Running
    reason: str
    pid: int | None = None
    uptime: float | None = None
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Write:
    """Write a file, in one step, with the folders above it."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"write {self.path}"

    def do(self) -> None:
        """Do it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".pi-reconciler-", dir=self.path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(descriptor, 0o644)
                file.write(self.text)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove a file."""

    path: Path

    def __str__(self) -> str:
        return f"remove {self.path}"

    def do(self) -> None:
        """Do it."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Run:
    """Run a command of the service manager.

    Attributes:
        command: program and arguments.
        may_fail: what it is to undo may not be there.
    """

    command: tuple[str, ...]
    may_fail: bool = False

    def __str__(self) -> str:
        return f"run {' '.join(self.command)}"

    def do(self) -> None:
        """Do it.

        Raises:
            ServiceError: it failed.
        """
        done = ask(self.command)
        if done.returncode and not self.may_fail:
            said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
            alone = _NO_MANAGER if "connect to bus" in said else ""
            raise ServiceError(f"{' '.join(self.command)}: {said}{alone}")


Step = Write | Remove | Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a service is to run.

    Attributes:
        program: the program and what leads to it, each an absolute path or a plain word.
        options: further options of ``run``.
        hardened: take from it all that the reconciler itself does not need.
    """

    program: tuple[str, ...]
    options: tuple[str, ...] = ()
    hardened: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """The whole command."""
        return (*self.program, "run", "--log-form", "json", *self.options)


def this_program(argv: Sequence[str] = sys.argv) -> tuple[str, ...]:
    """How this very program is started again, from anywhere.

    A link to it is kept as it is: it leads to the program after an upgrade, too.
    """
    started = Path(argv[0]).absolute()
    if started.name == "pi-reconciler" and os.access(started, os.X_OK):
        return (str(started),)
    return (str(Path(sys.executable).absolute()), "-m", "reconciler")


def template(name: str) -> str:
    """The text of a unit."""
    return (resources.files("reconciler") / "units" / name).read_text(encoding="utf-8")


# -- Whose file it is ----------------------------------------------------------------------------


def signed(text: str) -> str:
    """A file's text with the line that says who wrote it, and whether it was changed since."""
    mark = f"{_MARK}{_digest(text)}"
    head, _, rest = text.partition("\n")
    if head.startswith("<?xml"):
        return f"{head}\n<!-- {mark} -->\n{rest}"
    return f"# {mark}\n{text}"


def is_ours(text: str) -> bool:
    """Whether `install` wrote a file, and nobody has changed it since."""
    found = _MARKED.search(text)
    return found is not None and found[1] == _digest(_MARKED.sub("", text, count=1))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_foreign(paths: Sequence[Path], *, force: bool) -> None:
    """Refuse to touch what `install` did not write, or what was changed since.

    Raises:
        ServiceError: one of the files is such.
    """
    for path in paths:
        if force or not os.path.lexists(path):
            continue
        if path.is_symlink() or (text := text_of(path)) is None or not is_ours(text):
            raise ServiceError(
                f"{path} was not written by pi-reconciler service install, or was changed since: "
                "remove it, or give --force (your own changes belong into a drop-in, "
                "systemctl --user edit)"
            )


def text_of(path: Path) -> str | None:
    """What a file holds; None: it is not there, or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


Done = subprocess.CompletedProcess[str]


def ask(command: Sequence[str], run: Callable[..., Done] = subprocess.run) -> Done:
    """Run a command of a service manager.

    Raises:
        ServiceError: it is not there, or does not end.
    """
    try:
        return run(
            command,
            env=_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        raise ServiceError(
            f"{command[0]} is not there, so no service can be had: use pi-reconciler run"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{' '.join(command)}: {error}") from error


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """With where the user's manager is found, which `su` and cron do not say; in one language."""
    runtime = f"/run/user/{os.getuid()}"
    more = {"LC_ALL": "C"}
    if not environ.get("XDG_RUNTIME_DIR") and os.path.isdir(runtime):
        more["XDG_RUNTIME_DIR"] = runtime
    return {**environ, **more}
