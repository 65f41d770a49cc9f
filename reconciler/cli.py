"""The command line, ``pi-reconciler``.

Data goes to standard output, messages to standard error. Rooms are imported by the
command that needs them, so that a client command starts fast.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from reconciler import __version__
from reconciler.errors import InvalidRequestError, NoSuchSessionError, ReconcilerError
from reconciler.layout import InvalidSessionIdError

if TYPE_CHECKING:
    from reconciler.controller import Reconciler
    from reconciler.keeper import KeeperManager
    from reconciler.metrics import Metrics
    from reconciler.rpc_writer import BlockingRpcWriter, Delivery, ManyDelivery
    from reconciler.settings import Settings
    from reconciler.state import SessionTable

FAILURE, USAGE, NO_SUCH_SESSION, TRY_AGAIN, NOT_KNOWN, BAD_SETTINGS = 1, 2, 3, 75, 76, 78
"""Exit codes; 0 is success. 75 and 78 are sysexits' EX_TEMPFAIL and EX_CONFIG."""

INTERRUPTED = 130
"""What a shell expects of a program that Ctrl-C ended: 128 and the number of SIGINT."""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Common(NamedTuple):
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
    line = message.encode(errors="backslashreplace").decode().replace("\n", " ")
    with contextlib.suppress(OSError):  # nobody reads it: the exit code still tells
        click.echo(f"pi-reconciler: {line}", err=True)
    sys.exit(code)


class Group(click.Group):
    """The command group: aliases, and an end by Ctrl-C that says so once."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Find a command by its name or alias."""
        return super().get_command(ctx, {"ps": "ls"}.get(name, name))

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own type
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


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


def _address(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """``HOST:PORT``, split."""
    if value is None:
        return None
    host, _colon, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise click.BadParameter(f"{value!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _seconds(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """A span of time; click's own ranges let NaN pass."""
    if value is not None and not 0 < value <= _DAY:
        raise click.BadParameter(f"{value:g} is not above 0 and at most {_DAY} seconds")
    return value


_DAY = 86_400

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that all have, after its name as well as before it."""

    def remember(ctx: click.Context, option: click.Parameter, value: Path | None) -> None:
        chosen = ctx.ensure_object(dict)
        given = ctx.get_parameter_source(str(option.name)) is _FROM_COMMAND_LINE
        if value is not None and (given or option.name not in chosen):  # a flag beats a variable
            chosen[option.name] = value

    command = click.option(
        "--config",
        type=click.Path(path_type=Path),
        envvar="PI_RECONCILER_CONFIG",
        callback=remember,
        expose_value=False,
        metavar="FILE",
        help="The settings file.  [default: config.toml in the user's config folder]",
    )(command)
    return click.option(
        "--sessions-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="PI_RECONCILER_SESSIONS_DIR",
        callback=remember,
        expose_value=False,
        metavar="DIR",
        help="The sessions folder.  [default: ~/.pi/dashboard/sessions]",
    )(command)


_FROM_COMMAND_LINE = click.core.ParameterSource.COMMANDLINE


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


@click.group(cls=Group, context_settings=CONTEXT, invoke_without_command=True)
@click.version_option(__version__, prog_name="pi-reconciler")
@common
@click.pass_context
def cli(ctx: click.Context) -> None:
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
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(USAGE)


@cli.command(short_help="Keep the sessions folder right.")
@click.option("--once", is_flag=True, help="Do one full pass, and end when it is through.")
@click.option("--dry-run", is_flag=True, help="Decide and tell everything, and do nothing.")
@click.option(
    "--resync",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help="Time between two full looks when nothing asks for one.  [default: 60]",
)
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
    callback=_address,
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

    \b
    Clean up once, and end:           pi-reconciler run --once
    See what that would do:           pi-reconciler run --once --dry-run
    Log and metrics for an operator:  pi-reconciler run --log-form json --metrics 127.0.0.1:9464
    """  # noqa: D301 - click wants the real character
    import gc

    gc.disable()  # nothing that is imported here is garbage
    with _left_out("rich", "ssl"):  # asyncio and structlog take them in, and never need them here
        import asyncio

        import structlog  # noqa: F401 - it has to be now
    from reconciler.controller import Reconciler
    from reconciler.logs import make_logger

    settings = given.settings
    log = make_logger(sys.stdout, log_level or settings.log_level, log_form or settings.log_form)
    reconciler = Reconciler(
        given.manager(),
        resync=resync or settings.resync,
        dry_run=dry_run,
        logger=log,
        metrics=_metrics(*metrics) if metrics else None,
    )
    _raise_descriptor_limit()
    gc.freeze()  # a full collection holds the loop up: it need not walk all that was imported
    gc.enable()
    asyncio.run(_serve(reconciler, once=once))


@contextlib.contextmanager
def _left_out(*names: str) -> Iterator[None]:
    """Have modules not found for a while by those who can do without them.

    It takes a quarter off the daemon's start. Only a program may do so: in an application's
    process they are the application's. What asks for them later gets them.
    """
    absent: dict[str, Any] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


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


async def _serve(reconciler: Reconciler, *, once: bool) -> None:
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    async with reconciler:
        reasons: set[asyncio.Task[Any]] = {loop.create_task(asked.wait())}
        if once:
            reasons.add(loop.create_task(reconciler.settled()))
        ended, pending = await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in ended:
            task.result()


def _raise_descriptor_limit() -> None:
    """Each session takes two descriptors, for the exits of its keeper and its agent."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # where "no limit" is more than allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@cli.command(cls=WithAgent, short_help="Start a session.")
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

    \b
    A pi session in this folder:      pi-reconciler spawn demo
    With arguments for the agent:     pi-reconciler spawn demo -- pi --mode rpc --offline
    Elsewhere, its output kept:       pi-reconciler spawn demo --cwd ~/work --capture
    """  # noqa: D301 - click wants the real character
    import asyncio
    import json

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
    told = {
        "sid": spawned.sid,
        "keeper_pid": spawned.keeper_pid,
        "agent_pid": spawned.agent_pid,
        "socket": spawned.socket,
    }
    try:
        click.echo(json.dumps(told) if as_json else f"{spawned.sid} {spawned.keeper_pid}")
    except OSError as error:
        _close_output()
        reason = f"it could not be told on standard output: {error.strerror}"
        fail(f"session {spawned.sid} was started, but {reason}", FAILURE)


def _variables(pairs: Iterable[str]) -> dict[str, str]:
    variables = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise click.UsageError("--env wants K=V; what was given is not, and not repeated here")
        variables[key] = value
    return variables


@cli.command(
    context_settings={"allow_extra_args": True},  # told below, without repeating a prompt
    short_help="Write lines to a session.",
)
@click.argument("sid")
@click.argument("line")
@click.option(
    "--timeout",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help="When to give up.  [default: as the settings say, 3 attempts, 350 ms without progress]",
)
@click.option(
    "--key",
    metavar="KEY",
    help="A name for LINE: with the same key again it is not forwarded twice.",
)
@json_option
@pass_common
def write(
    given: Common, sid: str, line: str, timeout: float | None, key: str | None, *, as_json: bool
) -> None:
    """Write LINE to a session; with - the lines of standard input, in order.

    Ends with 0 when all is in the agent's input, with 75 when nothing was handed over (it
    is safe to try again), with 76 when that cannot be known, with 3 when there is no such
    session. The lines of standard input go through one connection; blank ones are skipped.

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
    try:
        if line == "-":
            delivery = _write_stdin(writer, sid, timeout)
        else:
            delivery = writer.write(sid, line, timeout=timeout, key=key)
    except InvalidMessageError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        _print_json(_delivery(delivery))
    if delivery.delivered:
        return
    claims = (Role.SOCKET, Role.PID_FILE)
    if not any(os.path.lexists(folder / file_name(role, sid)) for role in claims):
        raise NoSuchSessionError(f"no session {sid} in {folder}")
    _explain(delivery, folder)


def _write_stdin(writer: BlockingRpcWriter, sid: str, timeout: float | None) -> ManyDelivery:
    """Write the lines of standard input; a line that is none ends it, after those before it."""
    from reconciler.rpc_writer import InvalidMessageError, StreamBrokenError

    number, refused = 0, ""
    try:
        with writer.stream(sid, timeout=timeout) as stream:
            for number, line in enumerate(_progress(_lines()), 1):  # noqa: B007 - told below
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
    """Count the lines on the terminal, if standard error is one."""
    if not sys.stderr.isatty():
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


def _explain(delivery: Delivery, folder: Path) -> NoReturn:
    from reconciler.rpc_writer import Outcome, Reason
    from reconciler.trust import distrust_at

    attempts = f"{len(delivery.attempts)} attempt{'s' if len(delivery.attempts) != 1 else ''}"
    why = f"{delivery.reason.value} ({attempts})"
    if delivery.outcome is Outcome.NOT_DELIVERED:
        hint = ""
        if delivery.reason is Reason.REFUSED:
            hint = f" (nobody listens: see pi-reconciler inspect {delivery.sid})"
        elif delivery.reason is Reason.UNTRUSTED_FOLDER:
            hint = f" ({folder}: {distrust_at(folder)})"
        fail(f"session {delivery.sid}: not delivered, {why}; safe to try again{hint}", TRY_AGAIN)
    total, confirmed, unsent = _counts(delivery)
    sure = "" if total == 1 else f" ({confirmed} of {total} lines surely were, {unsent} were not)"
    advice = "look at the session before you send it again"
    fail(f"session {delivery.sid}: delivery not known, {why}{sure}; {advice}", NOT_KNOWN)


@cli.command(short_help="List the sessions (alias: ps).")
@json_option
@pass_common
def ls(given: Common, *, as_json: bool) -> None:
    """List the sessions, one row each (alias: ps).

    Looks at the folder and the processes itself, and needs no running daemon.

    \b
    For a script:                     pi-reconciler ls --json | jq -r '.[].sid'
    """  # noqa: D301 - click wants the real character
    from reconciler import screens

    manager = given.manager()
    rows = [screens.row(finding, manager.sessions_dir) for finding in manager.find()]
    if as_json:
        _print_json(rows)
    else:
        _print_lines(screens.table(rows))
    if not rows and not manager.sessions_dir.is_dir():
        click.echo(f"pi-reconciler: there is no folder {manager.sessions_dir}", err=True)


@cli.command(short_help="Tell all that is known of a session.")
@click.argument("sid")
@json_option
@pass_common
def inspect(given: Common, sid: str, *, as_json: bool) -> None:
    """Tell what is known of one session, what would be done about it, and why.

    With --json it is everything, to the inode. Looks itself, and changes nothing.

    \b
    Why is it not ready?              pi-reconciler inspect demo
    """  # noqa: D301 - click wants the real character
    from reconciler import screens

    manager = given.manager()
    finding = manager.inspect(sid)
    if as_json:
        _print_json(screens.everything(finding, manager.sessions_dir))
    else:
        _print_lines(screens.told(finding, manager.sessions_dir))


@cli.command(short_help="End sessions.")
@click.argument("sids", nargs=-1, metavar="[SID]...")
@click.option("--all", "everything", is_flag=True, help="Stop every session that `ls` lists.")
@click.option(
    "--leave", is_flag=True, help="Leave alone what a session has started besides its agent."
)
@json_option
@pass_common
def stop(
    given: Common, sids: tuple[str, ...], *, everything: bool, leave: bool, as_json: bool
) -> None:
    """End sessions; returns when their processes are dead and their files gone.

    SIGTERM first, SIGKILL 2 s later. What is left of a dead session is removed as well. What
    the agent has started (commands that still run, servers) ends with it; --leave keeps that,
    until the session's id is used again.

    \b
    Two of them:                      pi-reconciler stop demo other
    All that `ls` lists:              pi-reconciler stop --all
    """  # noqa: D301 - click wants the real character
    import asyncio

    from reconciler.layout import check_sid

    manager = given.manager()
    if everything == bool(sids):
        raise click.UsageError("give session ids, or --all")
    for sid in sids:
        check_sid(sid)
    chosen = dict.fromkeys(sids or (finding.seen.sid for finding in manager.find()))
    results = asyncio.run(_stop_all(manager, chosen, leave=leave))
    if everything:  # one that has gone by itself meanwhile is no failure
        results = [each for each in results if each[0] != NO_SUCH_SESSION]
    if as_json:
        _print_json([result for _, result in results])
    for code, result in results:
        if code:
            click.echo(f"pi-reconciler: {result['error']}", err=True)
        elif not as_json:
            others = f", with {result['leftovers']} more that it had started"
            click.echo(f"{result['sid']} stopped{others if result['leftovers'] else ''}")
    if failed := [code for code, _ in results if code]:
        sys.exit(NO_SUCH_SESSION if set(failed) == {NO_SUCH_SESSION} else FAILURE)


async def _stop_all(
    manager: KeeperManager, sids: Iterable[str], *, leave: bool
) -> list[tuple[int, dict[str, Any]]]:
    """Stop them all at the same time; each one's outcome, in order."""
    import asyncio

    async def one(sid: str) -> tuple[int, dict[str, Any]]:
        try:
            stopped = await manager.stop(sid, leave=leave)
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
            "leftovers": stopped.leftovers,
        }

    return list(await asyncio.gather(*map(one, sids)))


def _print_json(value: object) -> None:
    import json

    pretty = sys.stdout is not None and sys.stdout.isatty()
    click.echo(json.dumps(value, indent=2 if pretty else None))


def _print_lines(lines: Iterable[str]) -> None:
    click.echo("\n".join(lines))


def main() -> NoReturn:
    """Run the command line; whatever goes wrong becomes one line and an exit code."""
    import gc

    try:
        sys.exit(cli.main(prog_name="pi-reconciler", standalone_mode=False))
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pi-reconciler"
        fail(f"{error.format_message().rstrip('.')} (see {command} --help)", USAGE)
    except (InvalidSessionIdError, InvalidRequestError) as error:
        fail(str(error), USAGE)
    except NoSuchSessionError as error:
        fail(str(error), NO_SUCH_SESSION)
    except ReconcilerError as error:
        fail(str(error), FAILURE)
    except click.Abort:
        fail("interrupted", INTERRUPTED)
    except OSError as error:  # but for a broken pipe, which click ends with 1 in silence
        _close_output()
        fail(str(error), FAILURE)
    except Exception as error:
        if os.environ.get("PI_RECONCILER_DEBUG"):
            raise
        kind = type(error).__name__
        fail(f"a defect: {kind}: {error} (PI_RECONCILER_DEBUG=1 shows where)", FAILURE)
    finally:
        gc.freeze()  # the interpreter's end need not search for garbage in all that was imported


def _close_output() -> None:
    """Keep what could not be written from being tried again, and told of, at the very end."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
