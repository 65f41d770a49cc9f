"""`restart`: end sessions, and start them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from reconciler.commands.stop import Result, end_words, failure, tell
from reconciler.console import (
    NO_SUCH_SESSION,
    Common,
    complete_session,
    dry_run_option,
    json_option,
    pass_common,
    say,
)
from reconciler.errors import ReconcilerError

if TYPE_CHECKING:
    from reconciler.keeper import KeeperManager


@click.command(short_help="End sessions, and start them again.")
@click.argument("sids", nargs=-1, metavar="[SID]...", shell_complete=complete_session)
@click.option(
    "--all", "everything", is_flag=True, help="Restart every session that has a restart policy."
)
@click.option(
    "--leave", is_flag=True, help="Leave alone what a session has started besides its agent."
)
@dry_run_option
@json_option
@pass_common
def restart(
    given: Common,
    sids: tuple[str, ...],
    *,
    everything: bool,
    leave: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """End sessions as `stop` does, and start them again with what they were started with.

    What a session was started with is kept only if it was spawned with --restart on-failure or
    always; any other is refused before anything is ended: stop it, and spawn it again. A session
    that was given up, or waits to be started again, is started at once. It keeps its policy.

    The environment is not kept, since secrets are in it: the session gets that of this command,
    without what was given by --env. What the agent had in memory is gone.

    Returns when the keepers accept connections and the agents have lived 300 ms. If one does not
    come up again the reason is told, and `run` goes on trying, as the policy says.

    \b
    One that hangs:                   pi-reconciler restart demo
    After a new version of the agent: pi-reconciler restart --all
    What that would do:               pi-reconciler restart --all --dry-run
    With another key:                 API_KEY=... pi-reconciler restart demo
    """  # noqa: D301 - click wants the real character
    import asyncio

    from reconciler.layout import check_sid

    manager = given.manager()
    if everything == bool(sids):
        raise click.UsageError("give session ids, or --all, and not both")
    for sid in sids:
        check_sid(sid)
    chosen = dict.fromkeys(sids or (each.seen.sid for each in manager.find() if each.seen.record))
    if not (chosen or as_json):
        say(f"no session in {manager.sessions_dir} has a restart policy")
    if dry_run:
        results = [_rehearse(manager, sid, leave=leave) for sid in chosen]
    else:
        results = asyncio.run(_restart_all(manager, chosen, leave=leave))
    if everything:  # one that was stopped meanwhile is no failure
        results = [each for each in results if each[0] != NO_SUCH_SESSION]
    tell(results, _words, as_json=as_json)


def _words(result: Mapping[str, Any]) -> str:
    if result.get("dry_run"):
        steps = [*end_words(result), f"start {result['agent_program']} in {result['cwd']}"]
        return f"would restart {result['sid']}: {', '.join(steps)}"
    return f"{result['sid']} restarted, its keeper is {result['keeper_pid']}"


def _rehearse(manager: KeeperManager, sid: str, *, leave: bool) -> Result:
    """What would become of one session."""
    from reconciler import rehearsal

    try:
        end, program, cwd = rehearsal.restart(manager, sid, leave=leave)
    except (ReconcilerError, OSError, ValueError) as error:
        return failure(sid, error, dry_run=True)
    return 0, {
        "sid": sid,
        "dry_run": True,
        "keeper_pid": end.keeper_pid,
        "agent_pid": end.agent_pid,
        "leftovers": list(end.leftovers),
        "agent_program": program,
        "cwd": cwd,
    }


async def _restart_all(manager: KeeperManager, sids: Iterable[str], *, leave: bool) -> list[Result]:
    """Restart them all at the same time; each one's outcome, in order."""
    import asyncio

    async def one(sid: str) -> Result:
        try:
            spawned = await manager.restart(sid, leave=leave)
        except (ReconcilerError, OSError, ValueError) as error:
            return failure(sid, error, restarted=False)
        return 0, {
            "sid": sid,
            "restarted": True,
            "keeper_pid": spawned.keeper_pid,
            "agent_pid": spawned.agent_pid,
            "socket": spawned.socket,
        }

    return list(await asyncio.gather(*map(one, sids)))
