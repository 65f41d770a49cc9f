"""`config`: what the settings are, where each is from, and what may be set."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reconciler.console import (
    BAD_SETTINGS,
    USAGE,
    chosen,
    common,
    confirm,
    fail,
    json_option,
    print_json,
    print_lines,
)

if TYPE_CHECKING:
    from reconciler.settings import Loaded
    from reconciler.sources import Said


@click.group(short_help="Show and check the settings.", invoke_without_command=True)
@common
@click.pass_context
def config(ctx: click.Context) -> None:
    """Show and check the settings.

    They come from a TOML file, from environment variables and from flags: a flag beats a
    variable, that beats the file, that beats the default. docs/settings.md explains each.

    \b
    What is in force, and why:        pi-reconciler config show
    Before a daemon reads it:         pi-reconciler config check ./new.toml
    Have a daemon take the new file:  systemctl --user reload pi-reconciler
    """  # noqa: D301 - click wants the real character
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(USAGE)


@config.command(short_help="Show every setting, and where it is from.")
@click.option("--changed", is_flag=True, help="Only what the file, a variable or a flag says.")
@json_option
@common
def show(*, changed: bool, as_json: bool) -> None:
    """Show every setting in force, and who says it: default, file, variable or flag.

    What a daemon that runs was started with may differ: its environment, its own flags. With
    --json each setting also has its variable, its default, and whether SIGHUP is enough for a
    running daemon to take it.

    \b
    What was set, and where:          pi-reconciler config show --changed
    One of them, for a script:        pi-reconciler config show --json | jq .settings.resync.value
    """  # noqa: D301 - click wants the real character
    from reconciler.columns import aligned
    from reconciler.sources import Origin

    loaded = _loaded()
    said = {
        name: each
        for name, each in loaded.said.items()
        if not changed or each.origin is not Origin.DEFAULT
    }
    if as_json:
        file = _path()
        told = {name: _told(name, each) for name, each in said.items()}
        print_json({"file": str(file), "file_exists": os.path.exists(file), "settings": told})
    else:
        rows = [(name, json.dumps(each.value), _from(each)) for name, each in said.items()]
        print_lines(aligned([("KEY", "VALUE", "FROM"), *rows]))


@config.command(short_help="Check a settings file.")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
@common
def check(*, file: Path | None, as_json: bool) -> None:
    """Check FILE, or what a command would go by here: the file and the variables.

    Prints every problem on a line of its own, with the source, the key, what was found and what
    is allowed. Ends with 0 when there is none, else with 78.

    \b
    In a deployment:                  pi-reconciler config check new.toml && cp new.toml …
    """  # noqa: D301 - click wants the real character
    from reconciler.settings import SettingsError, load

    problems: tuple[str, ...] = ()
    try:
        load(file or chosen().get("config"), environ={} if file else os.environ)
    except SettingsError as error:
        problems = error.problems
    if as_json:
        print_json({"file": str(file or _path()), "problems": problems})
    elif problems:
        print_lines(problem.replace("\n", " ") for problem in problems)
    else:
        path = file or _path()
        confirm(f"{path}: {'no problem' if path.exists() else 'not there, and no problem'}")
    sys.exit(BAD_SETTINGS if problems else 0)


@config.command(short_help="Print the JSON Schema of the settings file.")
@common
def schema() -> None:
    """Print the JSON Schema of the settings file, for editors and other programs.

    config/pi-reconciler.schema.json is this text. An editor that knows TOML (with taplo, say)
    takes it by a first line `#:schema PATH` in the file.

    \b
    Beside your settings:             pi-reconciler config schema > pi-reconciler.schema.json
    """  # noqa: D301 - click wants the real character
    from reconciler.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@config.command(short_help="Print where the settings file is.")
@common
def path() -> None:
    """Print which settings file is read; it need not be there.

    \b
    Change it:                        "$EDITOR" "$(pi-reconciler config path)"
    """  # noqa: D301 - click wants the real character
    click.echo(_path())


def _path() -> Path:
    from reconciler.settings import default_path

    named: Path | None = chosen().get("config")
    return named or default_path()


def _loaded() -> Loaded:
    from reconciler.settings import SettingsError, load_all

    folder = chosen().get("sessions_dir")
    flags = {"sessions_dir": str(folder)} if folder else {}
    try:
        return load_all(chosen().get("config"), flags=flags)
    except SettingsError as error:
        fail(str(error), BAD_SETTINGS)


def _from(said: Said) -> str:
    """Who says it; the file's name would be the same in every row."""
    from reconciler.sources import Origin

    shown = said.origin in {Origin.VARIABLE, Origin.FLAG}
    return f"{said.origin.value} {said.source}" if shown else said.origin.value


def _told(name: str, said: Said) -> dict[str, Any]:
    from reconciler.schema import KEYS

    key = KEYS[name]
    return {
        "value": said.value,
        "from": said.origin.value,
        "source": said.source or None,
        "default": key.default,
        "allowed": key.allowed,
        "variable": key.variable,
        "sighup": key.at_once,
    }
