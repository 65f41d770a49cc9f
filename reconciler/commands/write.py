"""`write`: lines to a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.console import (
    NO_SUCH_SESSION,
    NOT_KNOWN,
    TRY_AGAIN,
    Common,
    complete_session,
    dry_run_option,
    fail,
    json_option,
    pass_common,
    print_json,
    seconds,
)

if TYPE_CHECKING:
    from reconciler.rpc_writer import BlockingRpcWriter, Delivery, ManyDelivery


@click.command(
    context_settings={"allow_extra_args": True},  # told below, without repeating a prompt
    short_help="Write lines to a session.",
)
@click.argument("sid", shell_complete=complete_session)
@click.argument("line")
@click.option(
    "--timeout",
    callback=seconds,
    metavar="SECONDS",
    help="When to give up.  [default: as the settings say, 3 attempts, 350 ms without progress]",
)
@click.option(
    "--key",
    metavar="KEY",
    help="A name for LINE: with the same key again it is not forwarded twice.",
)
@dry_run_option
@json_option
@pass_common
def write(
    given: Common,
    sid: str,
    line: str,
    timeout: float | None,
    key: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write LINE to a session; with - the lines of standard input, in order.

    Ends with 0 when all is in the agent's input, with 75 when nothing was handed over (it
    is safe to try again), with 76 when that cannot be known, with 3 when there is no such
    session. The lines of standard input go through one connection; blank ones are skipped.
    With --dry-run the lines are checked, and the keeper is asked to take none of them: the
    outcome is that of the asking.

    \b
    One command:                      pi-reconciler write demo '{"type":"get_state","id":"1"}'
    A file of them:                   pi-reconciler write demo - < commands.jsonl
    Safe to run again after a 76:     pi-reconciler write demo --key job-7 '{"type":"…"}'
    """  # noqa: D301 - click wants the real character
    from reconciler.layout import Role, check_sid, file_name
    from reconciler.rpc_writer import BlockingRpcWriter, InvalidMessageError, WritePolicy

    if click.get_current_context().args:
        raise click.UsageError("LINE is one argument: put it in quotes, or give it with -")
    check_sid(sid)
    if line == "-" and key is not None:
        raise click.UsageError("--key is for one LINE, not for standard input")
    folder = given.folder()
    writer = BlockingRpcWriter(folder, policy=given.settings.write or WritePolicy())
    delivery: Delivery
    told: dict[str, object] = {}
    try:
        if dry_run:
            told = _checked(line, key)
            delivery = _write_lines(writer, sid, (), timeout)
        elif line == "-":
            delivery = _write_lines(writer, sid, _progress(_lines()), timeout)
        else:
            delivery = writer.write(sid, line, timeout=timeout, key=key)
    except InvalidMessageError as error:
        raise click.UsageError(str(error)) from error
    if not delivery.delivered:
        claims = (Role.SOCKET, Role.PID_FILE)
        there = any(os.path.lexists(folder / file_name(role, sid)) for role in claims)
        code, why = (
            _explain(delivery, folder)
            if there
            else (NO_SUCH_SESSION, f"no session {sid} in {folder}")
        )
        fail(why, code, told={**_delivery(delivery), **told})
    if as_json:
        print_json({**_delivery(delivery), **told})
    elif told:
        lines = "1 line" if told["total"] == 1 else f"{told['total']} lines"
        click.echo(f"would write {told['size']} bytes in {lines} to {sid}")


def _checked(line: str, key: str | None) -> dict[str, object]:
    """Check all that would be written, as the writer does; how much it is."""
    from reconciler.messages import InvalidMessageError, encode, keyed

    if line != "-":
        size = len(encode(line))
        if key is not None:
            keyed(b"", key)
        return {"dry_run": True, "total": 1, "size": size}
    total = size = 0
    for number, each in enumerate(_lines(), 1):
        if each.strip():
            try:
                size += len(encode(each))
            except InvalidMessageError as error:
                raise InvalidMessageError(f"line {number} of standard input: {error}") from None
            total += 1
    return {"dry_run": True, "total": total, "size": size}


def _write_lines(
    writer: BlockingRpcWriter, sid: str, lines: Iterable[bytes], timeout: float | None
) -> ManyDelivery:
    """Write the lines of standard input; a line that is none ends it, after those before it.

    Without lines a connection is opened, and the keeper gives its receipt for that.
    """
    from reconciler.rpc_writer import InvalidMessageError, StreamBrokenError

    number, refused = 0, ""
    try:
        with writer.stream(sid, timeout=timeout) as stream:
            for number, line in enumerate(lines, 1):  # noqa: B007 - told below
                if not line.strip():
                    continue
                try:
                    stream.send(line, timeout=timeout)
                except InvalidMessageError as error:
                    refused = str(error)
                    break
    except StreamBrokenError as error:
        return error.delivery
    if stream.delivery is None:
        raise AssertionError("a stream that has ended knows its delivery")
    if refused:
        raise click.UsageError(
            f"line {number} of standard input: {refused}; "
            f"the {stream.delivery.total} before it were delivered, none after it was sent"
        )
    return stream.delivery


def _lines() -> Iterator[bytes]:
    from reconciler.rpc_writer import MAX_LINE

    if sys.stdin is None:
        raise click.UsageError("standard input is closed")
    while line := sys.stdin.buffer.readline(MAX_LINE + 2):
        yield line


def _progress(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Count the lines on the terminal, if standard error is one, and nobody types there."""
    if not sys.stderr.isatty() or sys.stdin is None or sys.stdin.isatty():
        yield from lines
        return
    with click.progressbar(lines, label="lines written", show_pos=True, file=sys.stderr) as bar:
        yield from bar


def _counts(delivery: Delivery) -> tuple[int, int, int]:
    """How many messages there were, how many surely arrived, and how many surely did not."""
    from reconciler.rpc_writer import ManyDelivery, Outcome

    if isinstance(delivery, ManyDelivery):
        return delivery.total, delivery.confirmed, delivery.unsent
    return 1, int(delivery.delivered), int(delivery.outcome is Outcome.NOT_DELIVERED)


def _delivery(delivery: Delivery) -> dict[str, object]:
    total, confirmed, unsent = _counts(delivery)
    return {
        "sid": delivery.sid,
        "outcome": delivery.outcome.value,
        "reason": delivery.reason.value,
        "total": total,
        "confirmed": confirmed,
        "unsent": unsent,
        "size": delivery.size,
        "elapsed_ms": round(delivery.elapsed * 1000, 3),
        "attempts": [
            {
                "started_ms": round(attempt.started * 1000, 3),
                "elapsed_ms": round(attempt.elapsed * 1000, 3),
                "reason": attempt.reason.value,
                "handed_over": attempt.handed_over,
            }
            for attempt in delivery.attempts
        ],
    }


def _explain(delivery: Delivery, folder: Path) -> tuple[int, str]:
    """How to end, and why, where something of the session is there."""
    from reconciler.rpc_writer import Outcome

    attempts = f"{len(delivery.attempts)} attempt{'s' if len(delivery.attempts) != 1 else ''}"
    why = f"{delivery.reason.value} ({attempts})"
    if delivery.outcome is Outcome.NOT_DELIVERED:
        hint = _hint(delivery, folder)
        words = f"session {delivery.sid}: not delivered, {why}; safe to try again ({hint})"
        return TRY_AGAIN, words
    total, confirmed, unsent = _counts(delivery)
    sure = "" if total == 1 else f" ({confirmed} of {total} lines surely were, {unsent} were not)"
    advice = "look at the session before you send it again"
    return NOT_KNOWN, f"session {delivery.sid}: delivery not known, {why}{sure}; {advice}"


def _hint(delivery: Delivery, folder: Path) -> str:
    """What kept a line from being delivered, and what to do about it."""
    from reconciler.rpc_writer import Reason
    from reconciler.trust import distrust_at

    look = f"see pi-reconciler inspect {delivery.sid}"
    match delivery.reason:
        case Reason.UNTRUSTED_FOLDER:
            return f"{folder}: {distrust_at(folder)}"
        case Reason.NO_KEYS:
            return "its keeper knows no keys: leave --key out"
        case Reason.BACKLOG_FULL | Reason.TIMED_OUT_BEFORE:
            end = f"hangs (pi-reconciler stop {delivery.sid})"
            return f"its keeper took nothing in time: it is busy, stopped (kill -CONT) or {end}"
        case Reason.REFUSED:
            return f"nobody listens: {look}"
        case Reason.NO_SOCKET:
            return f"it has no socket: {look}"
        case _:
            return look
