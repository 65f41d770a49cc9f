"""Each command and each setting that a page shows is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from reconciler.cli import cli
from reconciler.settings import parse

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SEPARATORS = frozenset({"|", "||", "&&", ";", "&", "#", "<", ">", ">>", ")"})


def blocks(page: Path, *languages: str) -> list[str]:
    kinds = "|".join(languages)
    return re.findall(rf"^```(?:{kinds})\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `pi-reconciler` that a page's shell blocks call."""
    found = []
    for line in "".join(blocks(page, "sh", "console")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        try:
            words = list(lexer)
        except ValueError:  # what a command has printed
            continue
        for at, word in enumerate(words):
            begins = at == 0 or words[at - 1] in {*SEPARATORS, "$", "("}
            if word == "pi-reconciler" and begins and (at or line.startswith("pi-reconciler ")):
                rest = words[at + 1 :]
                ends = [i for i, each in enumerate(rest) if each in SEPARATORS]
                found.append(rest[: ends[0]] if ends else rest)
    return found


def is_taken(arguments: list[str]) -> None:
    """Have click read a command line, and run nothing."""
    name: str = "pi-reconciler"
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    command.make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_is_taken(page: Path) -> None:
    for arguments in commands(page):
        if arguments and "--help" not in arguments:
            is_taken(arguments)


def test_they_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40
    with pytest.raises(click.UsageError):
        is_taken(["spawn", "demo", "--no-such-option"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_shows_is_taken(page: Path) -> None:
    for block in blocks(page, "toml"):
        if "[sources." not in block:  # a log shipper's own
            parse(block.encode(), page.name)
