from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from reconciler.ladder import Ladder
from reconciler.rpc_writer import WritePolicy
from reconciler.schema import KEYS
from reconciler.settings import Settings, SettingsError, default_path, load, parse
from reconciler.state import Policy

DEFAULTS = Path(__file__).parent.parent / "config" / "pi-reconciler.toml"


def names(table: Mapping[str, Any], place: str = "") -> set[str]:
    """The full name of every key."""
    found: set[str] = set()
    for key, value in table.items():
        name = f"{place}{key}"
        found |= names(value, f"{name}.") if isinstance(value, Mapping) else {name}
    return found


def test_the_file_of_defaults_says_what_the_rooms_do_without_one() -> None:
    said = load(DEFAULTS)
    assert said == Settings(policy=Policy(), ladder=Ladder(), write=WritePolicy())
    assert parse(b"") == Settings()


def test_the_file_of_defaults_names_every_key() -> None:
    assert names(tomllib.loads(DEFAULTS.read_text())) == names(KEYS)


def test_every_key_of_the_file_of_defaults_is_explained() -> None:
    lines = DEFAULTS.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if "=" in line and not line.startswith("#"):
            assert before.startswith("#"), line


def test_every_number_of_the_rooms_can_be_set() -> None:
    for table, room in (("policy", Policy), ("ladder", Ladder), ("write", WritePolicy)):
        assert list(KEYS[table]) == [field.name for field in dataclasses.fields(room)]


def test_what_a_file_says_reaches_the_rooms() -> None:
    said = parse(
        b"""
        sessions_dir = "~/elsewhere"
        programs = ["their_keeper.cjs"]
        keeper_command = ["node", "/opt/keeper.cjs"]
        agent_command = ["pi", "--offline"]
        resync = 5
        [policy]
        settle = 0.5
        [ladder]
        term_grace = 1
        [write]
        attempts = 1
        backoff = []
        [log]
        level = "debug"
        form = "console"
        """
    )
    assert said == Settings(
        sessions_dir=Path.home() / "elsewhere",
        programs=frozenset({"their_keeper.cjs"}),
        keeper_command=("node", "/opt/keeper.cjs"),
        agent_command=("pi", "--offline"),
        resync=5.0,
        policy=Policy(settle=0.5),
        ladder=Ladder(term_grace=1.0),
        write=WritePolicy(attempts=1, backoff=()),
        log_level="debug",
        log_form="console",
    )


SECONDS = "seconds above 0, 86400 at most"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("resync = -1", f"resync is -1, allowed: {SECONDS}"),
        ("resync = 0", f"resync is 0, allowed: {SECONDS}"),
        ("resync = nan", f"resync is nan, allowed: {SECONDS}"),
        ("resync = inf", f"resync is inf, allowed: {SECONDS}"),
        ("resync = 86401", f"resync is 86401, allowed: {SECONDS}"),
        ("resync = true", f"resync is True, allowed: {SECONDS}"),
        ("resync = '60'", f"resync is '60', allowed: {SECONDS}"),
        ("[policy]\nsettle = -0.1", f"policy.settle is -0.1, allowed: {SECONDS}"),
        ("[ladder]\nterm_grace = []", f"ladder.term_grace is [], allowed: {SECONDS}"),
        ("[write]\nattempts = 0", "write.attempts is 0, allowed: a whole number from 1 to 1000"),
        ("[write]\nattempts = 1.5", "write.attempts is 1.5, allowed: a whole number from 1 to"),
        ("[write]\nbackoff = [-1]", "write.backoff is [-1], allowed: a list of seconds from 0"),
        ("[write]\nbackoff = 1", "write.backoff is 1, allowed: a list of seconds from 0 to"),
        ("[log]\nlevel = 'loud'", "log.level is 'loud', allowed: one of debug, info, warning"),
        ("[log]\nform = 1", "log.form is 1, allowed: one of auto, json, console"),
        ("sessions_dir = 1", "sessions_dir is 1, allowed: a text"),
        ("programs = 'keeper.cjs'", "programs is 'keeper.cjs', allowed: a list of texts"),
        (
            "agent_command = [1]",
            "agent_command is something else (not repeated here), allowed: a list of texts",
        ),
        ('sessions_dir = "a\\u0000b"', r"sessions_dir is 'a\x00b', allowed: a text without NUL"),
        (
            'keeper_command = ["a\\u0000"]',
            r"keeper_command is ['a\x00'], allowed: a list of texts without",
        ),
        ("programs = " + "[" * 600, "its lists or tables are nested too deep"),
        (
            "[policy]\nleftovers = 'keep'",
            "policy.leftovers is 'keep', allowed: one of report, stop",
        ),
        ("policy = 3", "policy is 3, allowed: a table [policy]"),
        ("resink = 1", "resink is no setting, allowed: sessions_dir, programs, keeper_command,"),
        ("[log]\nlvl = 'info'", "log.lvl is no setting, allowed: level, form"),
        ("[policies]\n", "policies is no setting, allowed: sessions_dir,"),
        ("resync 60", "this is not TOML: "),
        ("resync = 1\nresync = 2", "this is not TOML: "),
        (f"sessions_dir = ['{'x' * 500}']", f"sessions_dir is ['{'x' * 58}..., allowed: a text"),
    ],
)
def test_a_bad_file_is_told_by_file_key_what_was_found_and_what_is_allowed(
    tmp_path: Path, text: str, told: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {told}")
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        parse(b"resync = 0\nfoo = 1\n[log]\nlevel = 3\n", "mine.toml")
    assert [problem.split(" is ")[0] for problem in str(caught.value).split("; ")] == [
        "mine.toml: resync",
        "foo",
        "log.level",
    ]


def test_text_that_is_not_utf8_is_not_toml() -> None:
    with pytest.raises(SettingsError, match=r"settings: this is not TOML: .*utf-8"):
        parse(b"\xff")


def test_a_file_that_is_named_must_be_there_and_be_readable(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"settings file '.*/none.toml' is not there"):
        load(tmp_path / "none.toml")
    with pytest.raises(SettingsError, match=r"settings file '.*' cannot be read: Is a directory"):
        load(tmp_path)


def test_the_default_file_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load() == Settings()
    default_path().parent.mkdir()
    default_path().write_text("resync = 7")
    assert load() == Settings(resync=7.0)


@pytest.mark.parametrize("chosen", [None, "", "/somewhere"])
def test_the_default_file_is_where_platformdirs_says(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    if chosen is None:
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CONFIG_HOME", chosen)
    folder = platformdirs.user_config_path("pi-reconciler", appauthor=False)
    assert default_path() == folder / "config.toml"
    assert default_path(platform="darwin") == folder / "config.toml"  # as this system would say


def test_the_default_file_of_linux_is_in_the_users_config_folder() -> None:
    assert default_path({}, Path("/home/u"), "linux") == Path(
        "/home/u/.config/pi-reconciler/config.toml"
    )
