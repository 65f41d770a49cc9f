"""`spawn`: start a session."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reconciler.console import (
    FAILURE,
    Common,
    close_output,
    dry_run_option,
    fail,
    json_option,
    pass_common,
    print_json,
)
from reconciler.errors import AgentExitedError

if TYPE_CHECKING:
    from reconciler.keeper import KeeperManager


class WithAgent(click.Command):
    """A command whose line may end in ``-- AGENT ARG...``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take what follows ``--`` away before click reads the rest."""
        if "--" in args:
            cut = args.index("--")
            ctx.meta["agent_command"] = tuple(args[cut + 1 :])
            args = args[:cut]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show the agent's place in the usage line."""
        return [*super().collect_usage_pieces(ctx), "[-- AGENT ARG...]"]


@click.command(cls=WithAgent, short_help="Start a session.")
@click.argument("sid", required=False)
@click.option(
    "--cwd", type=click.Path(path_type=Path), help="Where the agent runs.  [default: here]"
)
@click.option("--env", "pairs", multiple=True, metavar="K=V", help="Set a variable; may repeat.")
@click.option("--capture", is_flag=True, help="The agent's output goes to the keeper log.")
@click.option(
    "--restart",
    type=click.Choice(["never", "on-failure", "always"]),
    default="never",
    show_default=True,
    metavar="POLICY",
    help="Whether `run` starts it again when it has ended: never, on-failure or always.",
)
@dry_run_option
@json_option
@click.pass_context
@pass_common
def spawn(
    given: Common,
    ctx: click.Context,
    sid: str | None,
    cwd: Path | None,
    pairs: tuple[str, ...],
    *,
    capture: bool,
    restart: Any,  # noqa: ANN401 - one of click's choices
    dry_run: bool,
    as_json: bool,
) -> None:
    """Start a session, and print its id and its keeper's pid.

    SID is a new UUID when left out, and AGENT is `pi --mode rpc`. Returns when the keeper
    accepts connections and the agent has lived 300 ms; if it does not come to that, the
    reason is told and nothing is left.

    With --restart the agent's command is kept in the sessions folder (mode 0600), the
    environment is not: a session that is started again has that of `run`, without --env.
    A `stop` ends the restarts, too.

    \b
    A pi session in this folder:      pi-reconciler spawn demo
    With arguments for the agent:     pi-reconciler spawn demo -- pi --mode rpc --offline
    Elsewhere, its output kept:       pi-reconciler spawn demo --cwd ~/work --capture
    Started again when it fails:      pi-reconciler spawn demo --restart on-failure
    Would it start?                   pi-reconciler spawn demo --dry-run
    """  # noqa: D301 - click wants the real character
    import asyncio
    import json

    from reconciler.requests import default_environment

    manager = given.manager()
    options: dict[str, Any] = {
        "cwd": cwd,
        "env": {**default_environment(), **_variables(pairs)},
        "agent_command": ctx.meta.get("agent_command") or given.settings.agent_command,
        "capture": capture,
        "restart": restart,
    }
    if dry_run:
        _rehearse(manager, sid, options, as_json=as_json)
        return
    try:
        spawned = asyncio.run(manager.spawn(sid, **options))
    except AgentExitedError as error:
        if capture:
            raise
        raise AgentExitedError(f"{error}; with --capture it is told what it said") from error
    told = {
        "sid": spawned.sid,
        "keeper_pid": spawned.keeper_pid,
        "agent_pid": spawned.agent_pid,
        "socket": spawned.socket,
    }
    try:
        click.echo(json.dumps(told) if as_json else f"{spawned.sid} {spawned.keeper_pid}")
    except OSError as error:
        close_output()
        reason = f"it could not be told on standard output: {error.strerror}"
        fail(f"session {spawned.sid} was started, but {reason}", FAILURE)


def _rehearse(
    manager: KeeperManager, sid: str | None, options: dict[str, Any], *, as_json: bool
) -> None:
    from reconciler import rehearsal

    start = rehearsal.spawn(manager, sid, **options)
    if as_json:
        told = {
            "dry_run": True,
            "sid": sid,
            "agent_program": start.program,
            "cwd": start.cwd,
            "socket": start.socket if sid else None,
            "first": list(start.first),
        }
        print_json(told)
        return
    for step in start.first:
        click.echo(f"would {step}")
    click.echo(f"would start {sid or 'a session with a new id'}: {start.program} in {start.cwd}")


def _variables(pairs: Iterable[str]) -> dict[str, str]:
    variables = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise click.UsageError("--env wants K=V; what was given is not, and not repeated here")
        variables[key] = value
    return variables
