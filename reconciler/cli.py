"""The command line, ``pi-reconciler``.

Data goes to standard output, messages to standard error. Rooms are imported by the
command that needs them, so that a client command starts fast.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from reconciler import __version__
from reconciler.errors import InvalidRequestError, NoSuchSessionError, ReconcilerError
from reconciler.layout import InvalidSessionIdError

if TYPE_CHECKING:
    from reconciler.keeper import Finding, KeeperManager
    from reconciler.metrics import Metrics
    from reconciler.rpc_writer import BlockingRpcWriter, ManyDelivery
    from reconciler.settings import Settings
    from reconciler.state import SessionTable

FAILURE, NO_SUCH_SESSION, TRY_AGAIN, NOT_KNOWN, BAD_SETTINGS = 1, 3, 75, 76, 78
"""Exit codes; 0 is success, and click's 2 is wrong usage. 75 and 78 are sysexits' EX_TEMPFAIL
and EX_CONFIG."""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@dataclass(frozen=True, slots=True)
class Common:
    """What every command is given."""

    settings: Settings
    sessions_dir: Path | None

    def manager(self) -> KeeperManager:
        """The manager of the sessions folder, as the settings say."""
        from reconciler.keeper import KeeperManager
        from reconciler.spawning import OUR_KEEPER

        return KeeperManager(
            self.sessions_dir or self.settings.sessions_dir,
            keeper_command=self.settings.keeper_command or OUR_KEEPER,
            programs=self.settings.programs,
            policy=self.settings.policy,
            ladder=self.settings.ladder,
        )

    def folder(self) -> Path:
        """The sessions folder, without what a manager imports."""
        from reconciler.layout import sessions_dir

        chosen = self.sessions_dir or self.settings.sessions_dir
        return chosen or sessions_dir(os.environ, Path.home())


def fail(message: str, code: int) -> NoReturn:
    """End with one line on standard error."""
    click.echo(f"pi-reconciler: {message}", err=True)
    sys.exit(code)


class Group(click.Group):
    """The command group: aliases, options of all commands, errors as one line."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Find a command by its name or alias."""
        return super().get_command(ctx, {"ps": "ls"}.get(name, name))

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own type
        """Run a command; every failure that is known becomes a line and a code."""
        try:
            return super().invoke(ctx)
        except NoSuchSessionError as error:
            fail(str(error), NO_SUCH_SESSION)
        except (InvalidSessionIdError, InvalidRequestError) as error:
            raise click.UsageError(str(error)) from error
        except ReconcilerError as error:
            fail(str(error), FAILURE)


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


class Address(click.ParamType[tuple[str, int]]):
    """``HOST:PORT``."""

    name = "address"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Split it, or say what is wrong with it."""
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdecimal() or int(port) >= 1 << 16:
            self.fail(f"{value!r} is not HOST:PORT", param, ctx)
        return host.strip("[]"), int(port)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that all have, after its name as well as before it."""

    def remember(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
        if value is not None:
            ctx.ensure_object(dict)["sessions_dir"] = value

    def remember_config(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
        if value is not None:
            ctx.ensure_object(dict)["config"] = value

    command = click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="PI_RECONCILER_CONFIG",
        callback=remember_config,
        expose_value=False,
        help="The settings file.  [default: config.toml in the user's config folder]",
    )(command)
    return click.option(
        "--sessions-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="PI_RECONCILER_SESSIONS_DIR",
        callback=remember,
        expose_value=False,
        help="The sessions folder.  [default: ~/.pi/dashboard/sessions]",
    )(command)


def pass_common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Load the settings, and hand them to the command."""
    import functools

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - click's callbacks
        chosen = click.get_current_context().ensure_object(dict)
        return command(_common(chosen), *args, **kwargs)

    return common(run)


def _common(chosen: dict[str, Path]) -> Common:
    from reconciler.settings import SettingsError, load

    try:
        return Common(load(chosen.get("config")), chosen.get("sessions_dir"))
    except SettingsError as error:
        fail(str(error), BAD_SETTINGS)


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="pi-reconciler")
@common
def cli() -> None:
    """Keep the keepers of headless pi sessions right.

    A keeper owns one pi agent and listens on a socket in the sessions folder. This program
    removes what dead keepers leave behind, ends keepers whose agent is gone, and starts,
    writes to, lists and stops sessions.

    \b
    Start the background process:     pi-reconciler run
    Start a session, write to it:     pi-reconciler spawn demo
                                      pi-reconciler write demo '{"type":"get_state","id":"1"}'
    See what there is, and end it:    pi-reconciler ls
                                      pi-reconciler stop demo

    \b
    Exit codes: 0 success, 1 failure, 2 usage, 3 no such session, 75 not delivered (safe to
    send again), 76 delivery not known, 78 bad settings.
    """  # noqa: D301 - click wants the real character


@cli.command()
@click.option("--once", is_flag=True, help="Do one full pass, and end when it is through.")
@click.option("--dry-run", is_flag=True, help="Decide and tell everything, and do nothing.")
@click.option("--resync", type=float, help="Seconds between two full looks.  [default: 60]")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="The lowest level that is logged.  [default: info]",
)
@click.option(
    "--log-form",
    type=click.Choice(["auto", "json", "console"]),
    help="How log lines look; auto: console form on a terminal, else JSON.  [default: auto]",
)
@click.option(
    "--metrics",
    type=Address(),
    metavar="HOST:PORT",
    help="Expose metrics for Prometheus there, for instance 127.0.0.1:9464.  [default: off]",
)
@pass_common
def run(
    given: Common,
    *,
    once: bool,
    dry_run: bool,
    resync: float | None,
    log_level: Any,  # noqa: ANN401 - one of click's choices
    log_form: Any,  # noqa: ANN401 - one of click's choices
    metrics: tuple[str, int] | None,
) -> None:
    """Keep the sessions folder right: the background process.

    Its log goes to standard output. SIGTERM or SIGINT end it; keepers and agents live on.
    Only one can work on a folder; with --dry-run another one may look on.
    """
    import asyncio

    from reconciler.controller import Reconciler
    from reconciler.logs import make_logger

    settings = given.settings
    log = make_logger(sys.stdout, log_level or settings.log.level, log_form or settings.log.form)
    reconciler = Reconciler(
        given.manager(),
        resync=resync or settings.resync,
        dry_run=dry_run,
        logger=log,
        metrics=_metrics(*metrics) if metrics else None,
    )
    _raise_descriptor_limit()
    asyncio.run(_serve(reconciler, once=once))


def _metrics(host: str, port: int) -> Callable[[SessionTable], Metrics]:
    from reconciler.metrics import Metrics

    def expose(sessions: SessionTable) -> Metrics:
        metrics = Metrics(sessions)
        try:
            metrics.serve(host, port)
        except OSError as error:
            fail(f"metrics cannot be exposed on {host}:{port}: {error.strerror}", FAILURE)
        return metrics

    return expose


async def _serve(reconciler: Any, *, once: bool) -> None:  # noqa: ANN401 - imported late
    import asyncio
    import signal

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with reconciler:
        if once:
            await reconciler.settled()
        else:
            await ended.wait()


def _raise_descriptor_limit() -> None:
    """Each session takes two descriptors, for the exits of its keeper and its agent."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@cli.command(cls=WithAgent)
@click.argument("sid", required=False)
@click.option(
    "--cwd", type=click.Path(path_type=Path), help="Where the agent runs.  [default: here]"
)
@click.option("--env", "pairs", multiple=True, metavar="K=V", help="Set a variable; may repeat.")
@click.option("--capture", is_flag=True, help="The agent's output goes to the keeper log.")
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
    as_json: bool,
) -> None:
    """Start a session, and print its id and its keeper's pid.

    SID is a new UUID when left out, and AGENT is `pi --mode rpc`. Returns when the keeper
    accepts connections and the agent has lived 300 ms; if it does not come to that, the
    reason is told and nothing is left.
    """
    import asyncio

    from reconciler.spawning import default_environment

    spawned = asyncio.run(
        given.manager().spawn(
            sid,
            cwd=cwd,
            env={**default_environment(), **_variables(pairs)},
            agent_command=ctx.meta.get("agent_command") or given.settings.agent_command,
            capture=capture,
        )
    )
    if as_json:
        _print_json(
            {
                "sid": spawned.sid,
                "keeper_pid": spawned.keeper_pid,
                "agent_pid": spawned.agent_pid,
                "socket": spawned.socket,
            }
        )
    else:
        click.echo(f"{spawned.sid} {spawned.keeper_pid}")


def _variables(pairs: Iterable[str]) -> dict[str, str]:
    variables = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise click.UsageError(f"--env {pair!r} is not K=V")
        variables[key] = value
    return variables


@cli.command()
@click.argument("sid")
@click.argument("line")
@click.option("--timeout", type=float, help="Seconds after which to give up.")
@json_option
@pass_common
def write(given: Common, sid: str, line: str, timeout: float | None, *, as_json: bool) -> None:
    """Write LINE to a session; with - the lines of standard input, in order.

    Ends with 0 when all is in the agent's input, with 75 when nothing was handed over (it
    is safe to try again), with 76 when that cannot be known, with 3 when there is no such
    session. The lines of standard input go through one connection; blank ones are skipped.
    """
    from reconciler.layout import Role, check_sid, file_name
    from reconciler.rpc_writer import BlockingRpcWriter, InvalidMessageError

    check_sid(sid)
    folder = given.folder()
    writer = BlockingRpcWriter(folder, policy=given.settings.write)
    try:
        if line == "-":
            delivery = _write_stdin(writer, sid, timeout)
        else:
            delivery = writer.write_many(sid, (line,), timeout=timeout)
    except InvalidMessageError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        _print_json(_delivery(delivery))
    if delivery.delivered:
        return
    claims = (Role.SOCKET, Role.PID_FILE)
    if not any(os.path.lexists(folder / file_name(role, sid)) for role in claims):
        raise NoSuchSessionError(f"no session {sid} in {folder}")
    _explain(delivery)


def _write_stdin(writer: BlockingRpcWriter, sid: str, timeout: float | None) -> ManyDelivery:
    from reconciler.rpc_writer import StreamBrokenError

    try:
        with writer.stream(sid, timeout=timeout) as stream:
            for line in _progress(_lines()):
                stream.send(line, timeout=timeout)
    except StreamBrokenError as error:
        return error.delivery
    if stream.delivery is None:
        raise AssertionError("a stream that has ended knows its delivery")
    return stream.delivery


def _lines() -> Iterator[bytes]:
    for line in sys.stdin.buffer:
        if stripped := line.removesuffix(b"\n").strip():
            yield stripped


def _progress(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Count the lines on the terminal, if standard error is one."""
    if not sys.stderr.isatty():
        yield from lines
        return
    with click.progressbar(lines, label="lines written", show_pos=True, file=sys.stderr) as bar:
        yield from bar


def _delivery(delivery: ManyDelivery) -> dict[str, object]:
    return {
        "sid": delivery.sid,
        "outcome": delivery.outcome.value,
        "reason": delivery.reason.value,
        "total": delivery.total,
        "confirmed": delivery.confirmed,
        "unsent": delivery.unsent,
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


def _explain(delivery: ManyDelivery) -> NoReturn:
    from reconciler.rpc_writer import Outcome

    attempts = f"{len(delivery.attempts)} attempt{'s' if len(delivery.attempts) != 1 else ''}"
    why = f"{delivery.reason.value} ({attempts})"
    if delivery.outcome is Outcome.NOT_DELIVERED:
        fail(f"session {delivery.sid}: not delivered, {why}; safe to try again", TRY_AGAIN)
    sure = f"of {delivery.total} lines {delivery.confirmed} surely delivered, {delivery.unsent} not"
    fail(f"session {delivery.sid}: delivery not known, {why}; {sure}", NOT_KNOWN)


@cli.command()
@json_option
@pass_common
def ls(given: Common, *, as_json: bool) -> None:
    """List the sessions, one row each (alias: ps).

    Looks at the folder and the processes itself, and needs no running daemon.
    """
    manager = given.manager()
    rows = [_row(finding, manager.sessions_dir) for finding in manager.find()]
    if as_json:
        _print_json(rows)
        return
    cells = [("SID", "PHASE", "KEEPER", "AGENT", "AGE")]
    cells += [
        (
            str(row["sid"]),
            str(row["phase"]),
            str(row["keeper_pid"] or "-"),
            str(row["agent_pid"] or "-"),
            _age(row["age_s"]),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip())


def _row(finding: Finding, folder: Path) -> dict[str, Any]:
    from reconciler.layout import socket_address
    from reconciler.state import Session

    session = Session(finding.seen.sid, seen=finding.seen, plan=finding.plan)
    alive = session.keeper_pid is not None
    return {
        "sid": session.sid,
        "phase": session.phase.value,
        "keeper_pid": session.keeper_pid,
        "agent_pid": session.agent_pid,
        "age_s": round(finding.seen.keeper.age, 1) if alive else None,
        "socket": socket_address(folder, session.sid),
        "reason": session.reason,
    }


def _age(seconds: float | None) -> str:
    """An age as `docker ps` users know it: the two largest units."""
    if seconds is None:
        return "-"
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    left = int(seconds)
    parts: list[str] = []
    for name, size in units:
        if left >= size or (name == "s" and not parts):
            parts.append(f"{left // size}{name}")
        left %= size
    return "".join(parts[:2])


@cli.command()
@click.argument("sid")
@json_option
@pass_common
def inspect(given: Common, sid: str, *, as_json: bool) -> None:
    """Tell everything known of one session, and what would be done about it and why."""
    import msgspec

    manager = given.manager()
    finding = manager.inspect(sid)
    row = _row(finding, manager.sessions_dir)
    facts = msgspec.to_builtins(finding.seen, enc_hook=repr)
    told: dict[str, Any] = {
        **row,
        "actions": [_action(action) for action in finding.plan.actions],
        "look_again_after_s": finding.plan.again_after,
        "observation": _readable(facts),
    }
    if as_json:
        _print_json(told)
        return
    for line in _indented(told):
        click.echo(line)


def _action(action: object) -> str:
    """An action in words."""
    from reconciler.state import Adopt, Rebind, Remove, StopAgent, StopKeeper

    match action:
        case Remove(entries):
            return f"remove {', '.join(role.value for role, _ in entries)}"
        case StopKeeper(process, at_once):
            return f"stop keeper {process.pid}{' by SIGKILL' if at_once else ''}"
        case StopAgent(process):
            return f"stop agent {process.pid}"
        case Rebind(process):
            return f"tell keeper {process.pid} to bind its socket again"
        case Adopt(process):
            return f"write the pid file of keeper {process.pid} again"
        case _:
            return repr(action)


def _readable(facts: Any) -> Any:  # noqa: ANN401 - plain JSON values
    """Leave out what says nothing: empty texts, unknown numbers, monotonic stamps."""
    if isinstance(facts, dict):
        return {
            key: _readable(value)
            for key, value in facts.items()
            if value not in ("", None, [], 0) and key not in {"now", "since", "sid", "text"}
        }
    return facts


def _indented(told: dict[str, Any], depth: int = 0) -> Iterator[str]:
    for key, value in told.items():
        name = f"{'  ' * depth}{key}:"
        if isinstance(value, dict):
            yield name
            yield from _indented(value, depth + 1)
        elif isinstance(value, list):
            yield f"{name} {'; '.join(map(str, value)) or '-'}"
        else:
            yield f"{name} {'-' if value is None else value}"


@cli.command()
@click.argument("sids", nargs=-1, metavar="[SID]...")
@click.option("--all", "everything", is_flag=True, help="Stop every session that lives.")
@json_option
@pass_common
def stop(given: Common, sids: tuple[str, ...], *, everything: bool, as_json: bool) -> None:
    """End sessions; returns when their processes are dead and their files gone.

    SIGTERM first, SIGKILL 2 s later. What is left of a dead session is removed as well.
    """
    import asyncio

    manager = given.manager()
    if everything == bool(sids):
        raise click.UsageError("give session ids, or --all")
    chosen = sids or tuple(finding.seen.sid for finding in manager.find())
    results = asyncio.run(_stop_all(manager, chosen))
    if as_json:
        _print_json([result for _, result in results])
    for code, result in results:
        if code:
            click.echo(f"pi-reconciler: {result['error']}", err=True)
        elif not as_json:
            click.echo(f"{result['sid']} stopped")
    if failed := [code for code, _ in results if code]:
        sys.exit(NO_SUCH_SESSION if set(failed) == {NO_SUCH_SESSION} else FAILURE)


async def _stop_all(
    manager: KeeperManager, sids: Iterable[str]
) -> list[tuple[int, dict[str, Any]]]:
    """Stop them all at the same time; each one's outcome, in order."""
    import asyncio

    async def one(sid: str) -> tuple[int, dict[str, Any]]:
        try:
            stopped = await manager.stop(sid)
        except NoSuchSessionError as error:
            return NO_SUCH_SESSION, {"sid": sid, "stopped": False, "error": str(error)}
        except (ReconcilerError, OSError, ValueError) as error:
            return FAILURE, {"sid": sid, "stopped": False, "error": str(error)}
        elapsed = round(stopped.elapsed * 1000, 3)
        return 0, {
            "sid": sid,
            "stopped": True,
            "keeper_pid": stopped.keeper_pid,
            "elapsed_ms": elapsed,
        }

    return list(await asyncio.gather(*map(one, sids)))


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def main() -> None:
    """Run the command line."""
    cli(prog_name="pi-reconciler")
