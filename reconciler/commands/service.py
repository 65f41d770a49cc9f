"""`service`: the background process as a service of its user."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reconciler.console import (
    USAGE,
    Common,
    common,
    confirm,
    json_option,
    pass_common,
    print_json,
    print_lines,
    say,
)

if TYPE_CHECKING:
    from reconciler.managers import Manager
    from reconciler.service import Status, Step

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be written and run, and do nothing."
)
force_option = click.option(
    "--force",
    is_flag=True,
    help="Also a unit that `install` did not write; uninstall: also where no manager answers.",
)


_OF_SYSTEMD: Mapping[str, str] = {
    **dict.fromkeys(
        ("start", "stop", "restart", "reload", "enable", "disable"), "systemctl --user {}"
    ),
    **dict.fromkeys(("log", "logs"), "journalctl --user -u"),
}
"""What is left to systemd's own commands."""


class _Group(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for one of systemd's, name that."""
        name = args[0]
        if (own := _OF_SYSTEMD.get(name)) and not ctx.resilient_parsing:
            told = f"systemd has it: {own.format(name)} pi-reconciler"
            ctx.fail(f"No such command {name!r}, {told}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, short_help="Have the service manager run it.", invoke_without_command=True)
@common
@click.pass_context
def service(ctx: click.Context) -> None:
    """Have the service manager run the background process: systemd, or launchd on macOS.

    It is a service of your own user, and needs no root. Sessions live on when it is stopped,
    started again or uninstalled. docs/service.md tells more.

    \b
    Install and start it:             pi-reconciler service install
    How is it?                        pi-reconciler service status
    Its log, where systemd runs it:   journalctl --user -u pi-reconciler
    """  # noqa: D301 - click wants the real character
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(USAGE)


@service.command(short_help="Install it, and start it.")
@dry_run_option
@force_option
@click.option(
    "--hardened",
    is_flag=True,
    help="Take from it what the reconciler does not need; not for sessions that it restarts.",
)
@pass_common
def install(given: Common, *, dry_run: bool, force: bool, hardened: bool) -> None:
    """Install the service, and start it; again after an upgrade, to have that one run.

    Whether there is a service manager is asked first: nothing is written where none answers.

    It runs this very program, with the --sessions-dir and --config given here. A unit that was
    changed by hand is left alone, unless --force is given; `systemctl --user edit
    pi-reconciler` is the way to change one.

    \b
    What would be done?               pi-reconciler service install --dry-run
    With a settings file of its own:  pi-reconciler service install --config ~/pi.toml
    Also while you are logged out:    loginctl enable-linger
    """  # noqa: D301 - click wants the real character
    from reconciler.service import Wanted, this_program

    wanted = Wanted(program=this_program(), options=_options(given), hardened=hardened)
    _do(_manager().install(wanted, force=force), dry_run=dry_run)
    _advise(given)


@service.command(short_help="Stop it, and remove it.")
@dry_run_option
@force_option
@common
def uninstall(*, dry_run: bool, force: bool) -> None:
    """Stop the service, and remove it. Sessions, settings and logs stay.

    \b
    What would be done?               pi-reconciler service uninstall --dry-run
    """  # noqa: D301 - click wants the real character
    steps = _manager().uninstall(force=force)
    _do(steps, dry_run=dry_run)
    if not steps:
        say("it is not installed")


@service.command(short_help="Tell whether it runs.")
@json_option
@common
def status(*, as_json: bool) -> None:
    """Tell whether the service runs, as its manager says.

    Ends with 0 when it runs, with 3 when not, with 4 when that is not known: it is not
    installed, or the service manager cannot be asked.

    \b
    In a script:                      pi-reconciler service status > /dev/null || echo down
    As `status --json`, for another:  pi-reconciler service status --json | jq .state
    """  # noqa: D301 - click wants the real character
    from reconciler.service import Running, ServiceError, Status

    try:
        found = _manager().status()
    except ServiceError as error:
        found = Status(Running.NOT_KNOWN, str(error))
    if as_json:
        print_json(_plain(found))
    else:
        print_lines(_lines(found))
    sys.exit(found.running.value)


_STATES = {0: "running", 3: "not_running", 4: "not_known"}
# As `pi-reconciler status` says them.


def _plain(found: Status) -> dict[str, Any]:
    from datetime import UTC, datetime, timedelta

    began = None
    if found.uptime is not None:
        began = (datetime.now(UTC) - timedelta(seconds=found.uptime)).isoformat()[:-6] + "Z"
    return {
        "state": _STATES[found.running.value],
        "reason": found.reason or None,
        "pid": found.pid,
        "started_at": began,
        "uptime_s": None if found.uptime is None else round(found.uptime, 3),
        "manager": dict(found.told),
    }


def _lines(found: Status) -> Iterator[str]:
    from reconciler.columns import aligned

    state = _STATES[found.running.value].replace("_", " ")
    yield f"{state}: {found.reason}" if found.reason else state
    if rows := [(name, value) for name, value in found.told.items() if value not in {"", "0"}]:
        yield from aligned(rows)


def _manager() -> Manager:
    from reconciler.managers import manager

    return manager(os.environ, Path.home())


def _do(steps: list[Step], *, dry_run: bool) -> None:
    from reconciler.service import Write

    for step in steps:
        if dry_run:
            click.echo(f"would {step}")
            if isinstance(step, Write):
                click.echo("".join(f"    {line}\n" for line in step.text.splitlines()), nl=False)
            continue
        step.do()
        confirm(f"{step}: done")


def _options(given: Common) -> tuple[str, ...]:
    """What `run` has to be told, since a service does not get this shell's variables."""
    from reconciler.layout import sessions_dir
    from reconciler.settings import default_path

    options: tuple[str, ...] = ()
    sources, here = given.sources, given.folder().absolute()
    unasked = sources._replace(variables={}).settings().sessions_dir
    if here != (unasked or sessions_dir({}, Path.home())).absolute():
        options += ("--sessions-dir", str(here))
    path = sources.path.absolute()
    if sources.named or (sources.text and path != default_path({}).absolute()):
        options += ("--config", str(path))
    return options


def _advise(given: Common) -> None:
    from reconciler.managers import lingers

    known = {"PI_RECONCILER_SESSIONS_DIR"}
    if variables := sorted(given.sources.variables.keys() - known):
        say(f"a service does not get {', '.join(variables)}: put that into the settings file")
    if sys.platform == "linux" and not lingers(os.getuid()):
        say("it ends when you log out; to have it run on: loginctl enable-linger")
