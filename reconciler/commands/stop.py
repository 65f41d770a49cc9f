"""`stop`: end sessions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from reconciler.console import (
    FAILURE,
    NO_SUCH_SESSION,
    Common,
    complain,
    complete_session,
    confirm,
    dry_run_option,
    json_option,
    kind_of,
    pass_common,
    print_json,
    say,
)
from reconciler.errors import NoSuchSessionError, ReconcilerError

if TYPE_CHECKING:
    from reconciler.keeper import KeeperManager


@click.command(short_help="End sessions.")
@click.argument("sids", nargs=-1, metavar="[SID]...", shell_complete=complete_session)
@click.option("--all", "everything", is_flag=True, help="Stop every session that `ls` lists.")
@click.option(
    "--leave", is_flag=True, help="Leave alone what a session has started besides its agent."
)
@dry_run_option
@json_option
@pass_common
def stop(
    given: Common,
    sids: tuple[str, ...],
    *,
    everything: bool,
    leave: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """End sessions; returns when their processes are dead and their files gone.

    SIGTERM first, SIGKILL 2 s later (the setting ladder.term_grace). What is left of a dead
    session is removed as well. What the agent has started (commands that still run, servers)
    ends with it; --leave keeps that, until the session's id is used again.

    \b
    Two of them:                      pi-reconciler stop demo other
    All that `ls` lists:              pi-reconciler stop --all
    What that would end:              pi-reconciler stop --all --dry-run
    """  # noqa: D301 - click wants the real character
    import asyncio

    from reconciler.layout import check_sid

    manager = given.manager()
    if everything == bool(sids):
        raise click.UsageError("give session ids, or --all, and not both")
    for sid in sids:
        check_sid(sid)
    chosen = dict.fromkeys(sids or (finding.seen.sid for finding in manager.find()))
    if not (chosen or as_json):
        say(f"no session is in {manager.sessions_dir}")
    if dry_run:
        results = [_rehearse(manager, sid, leave=leave) for sid in chosen]
    else:
        results = asyncio.run(_stop_all(manager, chosen, leave=leave))
    if everything:  # one that has gone by itself meanwhile is no failure
        results = [each for each in results if each[0] != NO_SUCH_SESSION]
    tell(results, _words, as_json=as_json)


Result = tuple[int, dict[str, Any]]
"""What became of one session: 0 or an exit code, and what --json says of it."""


def tell(results: list[Result], words: Callable[[dict[str, Any]], str], *, as_json: bool) -> None:
    """Tell what became of each session, or would, and end as that asks for."""
    if as_json:
        print_json([result for _, result in results])
    for code, result in results:
        if code:
            complain(result["error"])
        elif result.get("dry_run") and not as_json:
            click.echo(words(result))
        elif not as_json:
            confirm(words(result))
    if failed := [code for code, _ in results if code]:
        sys.exit(NO_SUCH_SESSION if set(failed) == {NO_SUCH_SESSION} else FAILURE)


def failure(sid: str, error: Exception, **said: bool) -> Result:
    """What became of a session that nothing could be done about."""
    code = NO_SUCH_SESSION if isinstance(error, NoSuchSessionError) else FAILURE
    return code, {"sid": sid, **said, "error": str(error), "kind": kind_of(error)}


def end_words(end: Mapping[str, Any]) -> list[str]:
    """What would be ended and removed, for a person."""
    steps = [
        f"end {name} {end[f'{name}_pid']}" for name in ("keeper", "agent") if end[f"{name}_pid"]
    ]
    if end["leftovers"]:
        steps.append(f"end {', '.join(map(str, end['leftovers']))}, which it has started")
    if end.get("files"):
        steps.append(f"see {', '.join(end['files'])} gone")
    return steps


def _words(result: Mapping[str, Any]) -> str:
    if result.get("dry_run"):
        steps = ", ".join(end_words(result)) or "nothing to be done"
        return f"would stop {result['sid']}: {steps}"
    others = f", with {result['leftover_count']} more that it had started"
    return f"{result['sid']} stopped{others if result['leftover_count'] else ''}"


def _rehearse(manager: KeeperManager, sid: str, *, leave: bool) -> Result:
    """What would become of one session."""
    from reconciler import rehearsal

    try:
        end = rehearsal.stop(manager, sid, leave=leave)
    except (ReconcilerError, OSError, ValueError) as error:
        return failure(sid, error, dry_run=True)
    return 0, {
        "sid": sid,
        "dry_run": True,
        "keeper_pid": end.keeper_pid,
        "agent_pid": end.agent_pid,
        "leftovers": list(end.leftovers),
        "files": list(end.files),
    }


async def _stop_all(manager: KeeperManager, sids: Iterable[str], *, leave: bool) -> list[Result]:
    """Stop them all at the same time; each one's outcome, in order."""
    import asyncio

    async def one(sid: str) -> Result:
        try:
            stopped = await manager.stop(sid, leave=leave)
        except (ReconcilerError, OSError, ValueError) as error:
            return failure(sid, error, stopped=False)
        elapsed = round(stopped.elapsed * 1000, 3)
        return 0, {
            "sid": sid,
            "stopped": True,
            "keeper_pid": stopped.keeper_pid,
            "elapsed_ms": elapsed,
            "leftover_count": stopped.leftovers,
        }

    return list(await asyncio.gather(*map(one, sids)))
