"""The published schema, the page of settings and the reader say the same."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from reconciler.schema import KEYS, json_schema
from reconciler.settings import SettingsError, parse

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"
PUBLISHED = CONFIG / "pi-reconciler.schema.json"
PAGE = ROOT / "docs" / "settings.md"

GOOD = (
    "",
    'sessions_dir = ""',
    'sessions_dir = "/a b/ü"',
    "programs = []",
    "programs = ['a', 'b']",
    "resync = 86400",
    "resync = 1e-9",
    "resync = 1",
    "[policy]",
    "[policy]\nsettle = 0.5\nleftovers = 'stop'",
    "[ladder]\nterm_grace = 1\nkill_grace = 1",
    "[write]\nattempts = 1000\nbackoff = []",
    "[write]\nbackoff = [0, 86400.0]",
    "[log]\nlevel = 'debug'\nform = 'json'",
    "[log]\nform = 'ecs'\nsink = 'file'\nfile = '~/log'\nrotate_bytes = 0\nrotate_keep = 1",
)
BAD = (
    "resync = 0",
    "resync = -1",
    "resync = 86400.5",
    "resync = inf",
    "resync = true",
    "resync = '60'",
    "resync = [60]",
    "resync = 2026-01-01",
    "resink = 60",
    "'policy.settle' = 1",
    "settle = 1",
    "sessions_dir = 1",
    'sessions_dir = "a\\u0000"',
    "programs = 'keeper.cjs'",
    "programs = [1]",
    "agent_command = ['a', ['b']]",
    'keeper_command = ["\\u0000"]',
    "policy = 1",
    "policy = [{settle = 1}]",
    "[policy]\nsettle = 0",
    "[policy]\nleftovers = 'keep'",
    "[policy.settle]\nseconds = 1",
    "[policies]",
    "[ladder]\nterm_graze = 1",
    "[write]\nattempts = 0",
    "[write]\nattempts = 1.5",
    "[write]\nattempts = 1001",
    "[write]\nbackoff = [-0.1]",
    "[write]\nbackoff = 0.1",
    "[log]\nlevel = 'INFO'",
    "[log]\nform = 1",
    "[log]\nsink = 'syslog'",
    "[log]\nrotate_bytes = -1",
    "[log]\nrotate_keep = 0",
    "[log_budget]\ntotal = 65535",
    "[log_budget]\nage = 59",
)


def schema() -> Any:  # noqa: ANN401 - JSON
    return json.loads(PUBLISHED.read_text())


def fits(text: str) -> bool:
    return Draft202012Validator(schema()).is_valid(tomllib.loads(text))


def is_taken(text: str) -> bool:
    try:
        parse(text.encode())
    except SettingsError:
        return False
    return True


def test_the_published_schema_is_that_of_the_code_and_a_valid_one() -> None:
    told = "pi-reconciler config schema > config/pi-reconciler.schema.json"
    assert schema() == json.loads(json.dumps(json_schema())), f"a key was added? {told}"
    Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("text", GOOD)
def test_schema_and_reader_take_what_is_right(text: str) -> None:
    assert fits(text)
    assert is_taken(text)


@pytest.mark.parametrize("text", BAD)
def test_schema_and_reader_refuse_what_is_wrong(text: str) -> None:
    assert not fits(text)
    assert not is_taken(text)


def test_the_file_of_defaults_fits_and_names_its_schema() -> None:
    text = (CONFIG / "pi-reconciler.toml").read_text()
    assert fits(text)
    assert text.startswith(f"#:schema ./{PUBLISHED.name}\n")


def test_every_key_is_explained_by_the_schema() -> None:
    for key in KEYS.values():
        table = schema()["$defs"][key.table or "settings"]
        assert key.variable in table["properties"][key.field]["description"]


@pytest.mark.parametrize("name", KEYS)
def test_the_page_of_settings_has_every_key_as_it_is(name: str) -> None:
    key = KEYS[name]
    taken = "SIGHUP" if key.at_once else "start"
    default = json.dumps(key.default)
    row = f"| `{name}` | {key.allowed} | `{default}` | `{key.variable}` | {taken} | "
    told = [line.removeprefix(row) for line in PAGE.read_text().splitlines() if row in line]
    assert len(told) == 1, f"docs/settings.md wants one line that begins with: {row}"
    assert len(told[0]) > len("what |")


def test_the_page_of_settings_has_no_other_key() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(KEYS)
