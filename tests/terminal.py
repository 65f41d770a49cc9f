"""A real terminal for tests: tmux holds it, and says what stands on its screen."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import WAIT


class Terminal:
    """A shell in a terminal of 100 columns and 24 lines."""

    def __init__(self, place: Path, environ: Mapping[str, str]) -> None:
        self._tmux = ("tmux", "-u", "-S", str(place / "t"), "-f", "/dev/null")
        self._environ = {**environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        (place / "rc").write_text("PS1='$ '; unset HISTFILE\n")  # it would be written at the end
        shell = f"bash --noprofile --rcfile '{place}/rc'"
        self._run("new-session", "-d", "-x", "100", "-y", "24", shell)
        self.shows("$")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=True,
        )
        return done.stdout

    @property
    def screen(self) -> str:
        """What stands there, without the empty lines below it."""
        return "\n".join(map(str.rstrip, self._run("capture-pane", "-p").splitlines())).rstrip()

    @property
    def painted(self) -> str:
        """The same, with the sequences for its colours."""
        return self._run("capture-pane", "-p", "-e")

    def type(self, line: str) -> None:
        """Type a line, and Enter."""
        self.hold(line)
        self._run("send-keys", "Enter")

    def hold(self, line: str) -> None:
        """Type the beginning of a line."""
        self._run("send-keys", "-l", line)

    def press(self, key: str) -> None:
        """Press a key by tmux's name for it, say ``C-c``."""
        self._run("send-keys", key)

    def resize(self, columns: int, lines: int) -> None:
        """Make the window another size."""
        self._run("resize-window", "-x", str(columns), "-y", str(lines))

    def shows(self, text: str) -> str:
        """Wait until a text stands on the screen; gives the screen."""
        deadline = time.monotonic() + WAIT
        while text not in (screen := self.screen):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {WAIT:g} s in vain for {text!r} on:\n{screen}")
            time.sleep(0.02)
        return screen

    def clear(self) -> None:
        """Clear the screen: what is waited for from here on has not been there before."""
        self.type("clear")
        deadline = time.monotonic() + WAIT
        while (screen := self.screen) != "$":
            if time.monotonic() > deadline:
                pytest.fail(f"waited {WAIT:g} s in vain for an empty screen, not:\n{screen}")
            time.sleep(0.02)

    def is_as_before(self) -> bool:
        """Whether the shell's own screen is shown, with a cursor."""
        return self._run("display", "-p", "#{alternate_on} #{cursor_flag}").split() == ["0", "1"]

    def end(self) -> None:
        """End the shell, and what runs in it."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("kill-server")


@contextlib.contextmanager
def a_terminal(place: Path, environ: Mapping[str, str]) -> Iterator[Terminal]:
    """A terminal, for as long as the block lasts; without tmux the test is skipped."""
    if shutil.which("tmux") is None:
        assert not os.environ.get("CI"), "CI must have tmux: make tools"
        pytest.skip("tmux is not installed: make tools (as root)")
    terminal = Terminal(place, environ)
    try:
        yield terminal
    finally:
        terminal.end()
