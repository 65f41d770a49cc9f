from __future__ import annotations

import dataclasses
import itertools
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import pytest

from reconciler import schema
from reconciler.budget import LogBudget
from reconciler.ladder import Ladder
from reconciler.logs import LogSettings
from reconciler.ranges import Range
from reconciler.restarts import RestartLimits
from reconciler.rpc_writer import WritePolicy
from reconciler.schema import KEYS, TABLES
from reconciler.settings import (
    MOST,
    RESERVED,
    Settings,
    SettingsError,
    Sources,
    default_path,
    load,
    load_all,
    parse,
)
from reconciler.sources import Origin
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
    said = load(DEFAULTS, environ={})
    assert said == Settings(**{table: room() for table, room in TABLES.items()})
    assert parse(b"") == Settings() == load_all(Path(os.devnull), environ={}).settings


def test_the_file_of_defaults_names_every_key() -> None:
    assert names(tomllib.loads(DEFAULTS.read_text())) == set(KEYS)


def test_every_key_of_the_file_of_defaults_is_explained() -> None:
    lines = DEFAULTS.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if "=" in line and not line.startswith("#"):
            assert before.startswith("#"), line


def test_every_field_of_the_rooms_can_be_set() -> None:
    for table, room in TABLES.items():
        told = [key.field for key in KEYS.values() if key.table == table]
        assert told == [field.name for field in dataclasses.fields(room)]


def test_every_table_reaches_the_settings() -> None:
    assert set(Settings._fields) == {each.partition(".")[0] for each in KEYS}


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
        [restart]
        most = 3
        [ladder]
        term_grace = 1
        [write]
        attempts = 1
        backoff = []
        [log]
        level = "debug"
        form = "console"
        [log_budget]
        total = 1000000
        """
    )
    assert said == Settings(
        sessions_dir=Path.home() / "elsewhere",
        programs=frozenset({"their_keeper.cjs"}),
        keeper_command=("node", "/opt/keeper.cjs"),
        agent_command=("pi", "--offline"),
        resync=5.0,
        policy=Policy(settle=0.5),
        restart=RestartLimits(most=3),
        ladder=Ladder(term_grace=1.0),
        write=WritePolicy(attempts=1, backoff=()),
        log=LogSettings(level="debug", form="console"),
        log_budget=LogBudget(total=1_000_000),
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
        ("[log]\nform = 1", "log.form is 1, allowed: one of auto, json, ecs, console"),
        (
            "[log_budget]\ntotal = 65535",
            "log_budget.total is 65535, allowed: a whole number of bytes",
        ),
        ("[log_budget]\neach = 1e9", "log_budget.each is 1000000000.0, allowed: a whole number"),
        ("[log_budget]\nage = 59", "log_budget.age is 59, allowed: seconds from 60 to"),
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
        (".".join("a" * 2000) + " = 1", "its lists or tables are nested too deep"),
        ("resync = " + "1" * 5000, "this is not TOML: Exceeds the limit (4300 digits)"),
        ("resync = 0x" + "f" * 5000, "resync is a number too long, allowed: seconds above 0"),
        (
            "[policy]\nleftovers = 'keep'",
            "policy.leftovers is 'keep', allowed: one of report, stop",
        ),
        ("policy = 3", "policy is 3, allowed: a table [policy]"),
        ("resink = 1", "resink is no setting (did you mean resync?), allowed: sessions_dir, prog"),
        ("[log]\nlvl = 'x'", "log.lvl is no setting (did you mean log.level?), allowed: level,"),
        ("[polices]\n", "polices is no setting (did you mean policy?), allowed: sessions_dir,"),
        ("settle = 1", "settle is no setting (did you mean policy.settle?), allowed: sess"),
        ("zzz = 1", "zzz is no setting, allowed: sessions_dir,"),
        ('"policy.settle" = 1', "policy.settle is no setting (did you mean"),
        ('"a\\nb" = 1', r"'a\nb' is no setting, allowed: "),
        ("resync 60", "this is not TOML: "),
        ("resync = 1\nresync = 2", "this is not TOML: "),
        (f"sessions_dir = ['{'x' * 56}']", f"sessions_dir is ['{'x' * 56}'], allowed: a text"),
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


def test_what_is_allowed_in_a_table_is_its_keys() -> None:
    with pytest.raises(SettingsError) as caught:
        parse(b"[log]\nlvl = 'x'")
    fields = ", ".join(each.name for each in dataclasses.fields(LogSettings))
    assert str(caught.value).endswith(f"allowed: {fields}")


def test_a_thousand_dots_in_a_line_are_not_too_many() -> None:
    assert parse(b"# " + b"." * 1000) == Settings()


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
    with pytest.raises(SettingsError, match=r"settings file '.*' cannot be read: it is no regular"):
        load(tmp_path)
    closed = tmp_path / "file" / "config.toml"
    closed.parent.write_text("")
    with pytest.raises(SettingsError, match=f"file '{closed}' cannot be read: Not a directory"):
        load(closed)
    broken = Path("/proc/self/mem")  # nothing is to be had of its first page
    with pytest.raises(SettingsError, match=f"file '{broken}' cannot be read: Input/output error"):
        load(broken)


def test_a_file_that_is_none_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SettingsError, match=f"'{tmp_path}/fifo' cannot be read: it is no regular"):
        load(tmp_path / "fifo")


@pytest.mark.parametrize("named", [True, False], ids=["named", "default"])
def test_the_file_is_read_again_where_it_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, named: bool
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = default_path()
    path.parent.mkdir()
    path.write_text("resync = 1")
    sources = Sources.read(path if named else None, {}, {"log.level": "debug"})
    path.write_text("resync = 2")
    assert sources.again().settings() == Settings(resync=2.0, log=LogSettings(level="debug"))
    path.unlink()
    if named:
        with pytest.raises(SettingsError, match=f"settings file '{path}' is not there"):
            sources.again()
    else:
        assert sources.again() == sources._replace(text=b"")


def test_the_length_of_a_file_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"#" * MOST)
    assert load(tmp_path / "long", environ={}) == Settings()
    (tmp_path / "long").write_bytes(b"#" * (MOST + 1))
    with pytest.raises(SettingsError, match=f"long' cannot be read: it is longer than {MOST} byt"):
        load(tmp_path / "long", environ={})


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


# -- Variables and flags -----------------------------------------------------------------------


def test_a_flag_beats_a_variable_that_beats_the_file_that_beats_the_default(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        "resync = 1\nprograms = ['file.cjs']\n[policy]\nsettle = 1\n[log]\nlevel='error'"
    )
    variables = {"PI_RECONCILER_POLICY_SETTLE": "2", "PI_RECONCILER_RESYNC": "2"}
    loaded = load_all(path, environ=variables, flags={"resync": 3.0})
    told = {name: (said.value, said.origin, said.source) for name, said in loaded.said.items()}
    assert told["resync"] == (3.0, Origin.FLAG, "--resync")
    assert told["policy.settle"] == (2.0, Origin.VARIABLE, "PI_RECONCILER_POLICY_SETTLE")
    assert told["programs"] == (("file.cjs",), Origin.FILE, str(path))
    assert told["policy.start_grace"] == (5.0, Origin.DEFAULT, "")
    assert told.keys() == KEYS.keys()
    assert loaded.settings == load(path, environ=variables, flags={"resync": 3.0})
    assert loaded.settings == Settings(
        resync=3.0,
        programs=frozenset({"file.cjs"}),
        policy=Policy(settle=2.0),
        log=LogSettings(level="error"),
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RESYNC": "5"}, Settings(resync=5.0)),
        ({"RESYNC": "1e-3"}, Settings(resync=0.001)),
        ({"RESYNC": ""}, Settings()),
        ({"SESSIONS_DIR": "/a"}, Settings(sessions_dir=Path("/a"))),
        ({"SESSIONS_DIR": "~/a"}, Settings(sessions_dir=Path.home() / "a")),
        ({"SESSIONS_DIR": "/a", "RESYNC": "5"}, Settings(sessions_dir=Path("/a"), resync=5.0)),
        ({"SESSIONS_DIR": "/\udcff"}, Settings(sessions_dir=Path("/\udcff"))),
        ({"PROGRAMS": '["a.cjs", "b"]'}, Settings(programs=frozenset({"a.cjs", "b"}))),
        ({"AGENT_COMMAND": '["pi"]'}, Settings(agent_command=("pi",))),
        ({"LOG_LEVEL": "debug"}, Settings(log=LogSettings(level="debug"))),
        ({"WRITE_BACKOFF": "[0, 0.5]"}, Settings(write=WritePolicy(backoff=(0.0, 0.5)))),
        ({"WRITE_ATTEMPTS": "1"}, Settings(write=WritePolicy(attempts=1))),
        ({"POLICY_LEFTOVERS": "stop"}, Settings(policy=Policy(leftovers="stop"))),
    ],
)
def test_a_variable_says_what_a_file_could(variables: dict[str, str], said: Settings) -> None:
    environ = {f"PI_RECONCILER_{name}": text for name, text in variables.items()}
    assert load(Path(os.devnull), environ=environ) == said
    assert load_all(Path(os.devnull), environ=environ).settings == said


def test_every_key_has_a_variable_of_its_own() -> None:
    variables = [key.variable for key in KEYS.values()]
    assert len(set(variables)) == len(KEYS)
    assert not RESERVED & set(variables)


def test_every_variable_that_the_project_knows_is_a_setting_or_reserved() -> None:
    """A test's own, say, would else be refused by each program that inherits it."""
    root = Path(__file__).parent.parent
    wrong = {"test_settings.py", "test_cli_config.py"}
    journal = {"test_journal.py"}  # fields of the journal, no variables
    sources = [
        root / "Makefile",
        *(root / "reconciler").rglob("*.py"),
        *(root / "tests").glob("*.py"),
    ]
    known = RESERVED | {key.variable for key in KEYS.values()}
    for source in sources:
        if source.name not in wrong | journal:
            told = set(re.findall(r"\bPI_RECONCILER_[A-Z_]+[A-Z]\b", source.read_text()))
            assert told <= known, source


def test_what_is_taken_at_once_is_a_key_or_a_table() -> None:
    assert KEYS.keys() | TABLES.keys() >= schema.AT_ONCE


def test_variables_of_ours_that_are_no_settings_say_nothing() -> None:
    environ = dict.fromkeys(RESERVED, "whatever") | {"OTHER": "1"}
    assert load(Path(os.devnull), environ=environ) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("RESYNC", "-1", f"PI_RECONCILER_RESYNC is '-1', allowed: {SECONDS}"),
        ("RESYNC", "nan", f"PI_RECONCILER_RESYNC is 'nan', allowed: {SECONDS}"),
        ("RESYNC", "5 s", f"PI_RECONCILER_RESYNC is '5 s', allowed: {SECONDS}"),
        ("WRITE_ATTEMPTS", "0", "PI_RECONCILER_WRITE_ATTEMPTS is '0', allowed: a whole number"),
        ("LOG_LEVEL", "loud", "PI_RECONCILER_LOG_LEVEL is 'loud', allowed: one of debug, info,"),
        (
            "PROGRAMS",
            "a.cjs",
            "PI_RECONCILER_PROGRAMS is 'a.cjs', allowed: a list of texts without NUL, as a JSON",
        ),
        ("PROGRAMS", "[" * 5000, "PI_RECONCILER_PROGRAMS is '[[["),
        ("PROGRAMS", "[1]", "PI_RECONCILER_PROGRAMS is '[1]', allowed: a list of texts"),
        ("PROGRAMS", "\udcff", "PI_RECONCILER_PROGRAMS is '\\udcff', allowed: a list of texts"),
        (
            "AGENT_COMMAND",
            "pi --token=s3cret",
            "PI_RECONCILER_AGENT_COMMAND is something else (not repeated here), allowed: a list",
        ),
        (
            "LOG_LEVL",
            "info",
            "PI_RECONCILER_LOG_LEVL is no setting (did you mean PI_RECONCILER_LOG_LEVEL?), allow",
        ),
        ("ZZZZZZ", "s3cret", "PI_RECONCILER_ZZZZZZ is no setting, allowed: PI_RECONCILER_<KEY>,"),
    ],
)
def test_a_bad_variable_is_told_by_its_name(name: str, text: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(Path(os.devnull), environ={f"PI_RECONCILER_{name}": text})
    assert str(caught.value).startswith(f"environment: {told}")
    assert "s3cret" not in str(caught.value)


def test_all_sources_tell_what_is_wrong_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("resync = 0\nfoo = 1\n")
    environ = {"PI_RECONCILER_ZZZZZZ": "1", "PI_RECONCILER_LOG_LEVEL": "loud"}
    with pytest.raises(SettingsError) as caught:
        load(path, environ=environ, flags={"log_budget.total": 5})
    told = [
        f"{path}: resync",
        f"{path}: foo",
        "environment: PI_RECONCILER_ZZZZZZ",
        "environment: PI_RECONCILER_LOG_LEVEL",
        "command line: --log-budget-total",
    ]
    assert [problem.partition(" is ")[0] for problem in caught.value.problems] == told
    *_, level, total = caught.value.problems
    assert level.endswith(f" is 'loud', allowed: {KEYS['log.level'].allowed}")
    assert total.endswith(f" is 5, allowed: {KEYS['log_budget.total'].allowed}")
    parts = [problem.partition(" is ")[0] for problem in str(caught.value).split("; ")]
    assert parts == [told[0], "foo", told[2], "PI_RECONCILER_LOG_LEVEL", told[4]]


def test_values_that_do_not_go_together_are_a_rooms_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: WritePolicy) -> None:
        raise ValueError("one is above the other")

    monkeypatch.setattr(WritePolicy, "__post_init__", refuse)
    with pytest.raises(SettingsError, match=r"^\[write\]: one is above the other$"):
        parse(b"[write]\nattempts = 2")


def test_a_room_says_the_range_of_its_own_numbers() -> None:
    @dataclasses.dataclass
    class Room:
        size: Annotated[int, Range(0, 1 << 30, "bytes")] = 0

    (key,) = schema._keys(Room).values()
    assert key.allowed == "bytes from 0 to 1073741824"
