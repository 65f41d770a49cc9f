"""`run`: the background process."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from reconciler.addresses import MetricsSettings, host_and_port
from reconciler.console import BAD_SETTINGS, FAILURE, USAGE, Common, fail, pass_common, seconds
from reconciler.errors import InvalidRequestError

if TYPE_CHECKING:
    import asyncio

    from structlog.typing import FilteringBoundLogger

    from reconciler.controller import Reconciler
    from reconciler.exposition import Exposition
    from reconciler.keeper import KeeperManager
    from reconciler.metrics import Metrics
    from reconciler.reloads import Reloads
    from reconciler.sessions import SessionTable
    from reconciler.settings import Settings


_GARBAGE = 10_000
# Objects made since, and alive, at which Python looks for garbage in circles. Nearly nothing here
# goes in circles, and at its 700 that takes a twentieth of the clean-up after a great loss.


def _address(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """``HOST:PORT``, split."""
    if value is None:
        return None
    try:
        return host_and_port(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


class _Whole(click.IntRange):
    """click's range, in a person's words."""

    name = "whole number"


@click.command(short_help="Keep the sessions folder right.")
@click.option("--once", is_flag=True, help="Do one full pass, and end when it is through.")
@click.option("--dry-run", is_flag=True, help="Decide and tell everything, and do nothing.")
@click.option(
    "--resync",
    callback=seconds,
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
    type=click.Choice(["auto", "json", "ecs", "console"]),
    help="How log lines look; auto: console form on a terminal, else JSON.  [default: auto]",
)
@click.option(
    "--log-sink",
    type=click.Choice(["stdout", "file", "journald"]),
    help="Where log lines go.  [default: file with --log-file, else stdout]",
)
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Append log lines to it, even when it is renamed meanwhile.",
)
@click.option(
    "--log-rotate-bytes",
    type=_Whole(0, 1 << 50),
    metavar="N",
    help="Rename that file to FILE.1 when it grows over N bytes; 0: never.  [default: 0]",
)
@click.option(
    "--log-rotate-keep",
    type=_Whole(1, 1000),
    metavar="N",
    help="How many of FILE.1, FILE.2 ... are kept.  [default: 5]",
)
@click.option(
    "--metrics",
    callback=_address,
    metavar="HOST:PORT",
    help="Answer /metrics and /healthz there, for instance 127.0.0.1:9464.  [default: off]",
)
@click.option(
    "--metrics-public", is_flag=True, help="Let --metrics be an address that other machines reach."
)
@pass_common
def run(
    given: Common,
    *,
    once: bool,
    dry_run: bool,
    resync: float | None,
    log_level: str | None,
    log_form: str | None,
    log_sink: str | None,
    log_file: str | None,
    log_rotate_bytes: int | None,
    log_rotate_keep: int | None,
    metrics: tuple[str, int] | None,
    metrics_public: bool,
) -> None:
    """Keep the sessions folder right: the background process, a daemon.

    Its log goes to standard output, to a file or to the journal. SIGTERM or SIGINT end it;
    keepers and agents live on. SIGHUP has it take changed settings (and ends it once its
    terminal is gone). Only one can work on a folder; with --dry-run another one may look on.

    \b
    Clean up once, and end:           pi-reconciler run --once
    See what that would do:           pi-reconciler run --once --dry-run
    Log and metrics for an operator:  pi-reconciler run --log-form json --metrics 127.0.0.1:9464
    A log of 5 files, 10 MB each:     pi-reconciler run --log-file FILE --log-rotate-bytes 10000000
    """  # noqa: D301 - click wants the real character
    import gc

    gc.disable()  # nothing that is imported here is garbage
    with _left_out("rich", "ssl"):  # asyncio and structlog take them in, and never need them here
        import asyncio

        import structlog  # noqa: F401 - it has to be now
    from reconciler.controller import Reconciler
    from reconciler.descriptors import raise_limit
    from reconciler.reloads import Reloads

    has_hung_up = _terminals()
    settings = given.settings
    about_log = {
        "log.level": log_level,
        "log.form": log_form,
        "log.sink": log_sink or ("file" if log_file else None),
        "log.file": log_file,
        "log.rotate_bytes": log_rotate_bytes,
        "log.rotate_keep": log_rotate_keep,
    }
    log = _log(given, about_log)
    exposition = _exposition(settings, metrics, public=metrics_public)
    manager = given.manager()
    unmade = "" if once or dry_run else _make_folder(manager)
    reconciler = Reconciler(
        manager,
        resync=resync or settings.resync,
        dry_run=dry_run,
        logger=log,
        log_budget=settings.log_budget,
        metrics=_counting() if exposition else None,
        control=True,
    )
    if unmade:
        reconciler.log.warning(
            "folder.unusable", folder=str(manager.sessions_dir), reason=f"cannot be made: {unmade}"
        )
    about_metrics = {
        "metrics.address": "{}:{}".format(*metrics) if metrics else None,
        "metrics.public": metrics_public or None,
    }
    flags = _flags(given, {"resync": resync, **about_log, **about_metrics})
    reloads = functools.partial(
        Reloads, given.sources._replace(flags=flags), _taker(given, reconciler, log), reconciler.log
    )
    raise_limit()
    gc.freeze()  # a full collection holds the loop up: it need not walk all that was imported
    gc.set_threshold(_GARBAGE)
    gc.enable()
    asyncio.run(_serve(reconciler, reloads, exposition, has_hung_up, once=once))


def _make_folder(manager: KeeperManager) -> str:
    """Make the sessions folder; why it cannot be made, which is no end: it is waited for."""
    try:
        manager.make_folder()
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


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


def _log(given: Common, flags: Mapping[str, Any]) -> FilteringBoundLogger:
    """The program's own log: as the flags say, or else the settings."""
    import dataclasses

    from reconciler.logs import LogSettings, SinkError, open_log

    asked = {name.removeprefix("log."): said for name, said in flags.items() if said is not None}
    said = dataclasses.replace(given.settings.log or LogSettings(), **asked)
    try:
        return open_log(said, sys.stdout, colors=given.colors)
    except SinkError as error:
        fail(str(error), BAD_SETTINGS)


def _exposition(
    settings: Settings, asked: tuple[str, int] | None, *, public: bool
) -> Exposition | None:
    """Where metrics and health are to be had: as the flag says, or else the settings."""
    said = settings.metrics or MetricsSettings()
    if asked is None and not said.address:
        return None
    from reconciler.exposition import Exposition

    try:
        return Exposition(*asked or host_and_port(said.address), public=public or said.public)
    except (InvalidRequestError, ValueError) as error:
        fail(f"metrics: {error}", USAGE if asked else BAD_SETTINGS)
    except OSError as error:
        where = "{}:{}".format(*asked) if asked else said.address
        fail(f"metrics cannot be exposed on {where}: {error.strerror}", FAILURE)


def _counting() -> Callable[[SessionTable], Metrics]:
    import prometheus_client

    from reconciler.metrics import Metrics

    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # twice the lines
    return Metrics


def _flags(given: Common, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, by the names of settings."""
    said = {name: value for name, value in asked.items() if value is not None}
    return said | ({"sessions_dir": str(given.sessions_dir)} if given.sessions_dir else {})


def _taker(
    given: Common, reconciler: Reconciler, log: FilteringBoundLogger
) -> Callable[[Settings], None]:
    """What puts new settings in force: all that can change while it runs, in one step."""
    from reconciler.logs import LogSettings, set_level

    def take(new: Settings) -> None:
        here = reconciler.manager.sessions_dir
        manager = given._replace(settings=new, sessions_dir=here).manager()
        reconciler.go_by(manager, resync=new.resync, log_budget=new.log_budget)
        set_level(log, (new.log or LogSettings()).level)

    return take


async def _serve(
    reconciler: Reconciler,
    make_reloads: Callable[..., Reloads],
    exposition: Exposition | None,
    has_hung_up: Callable[[], bool],
    *,
    once: bool,
) -> None:
    import asyncio
    import signal

    from reconciler.logs import dropped
    from reconciler.notify import Notifier
    from reconciler.oversight import Oversight

    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    notifier = Notifier(os.environ)
    reloads = make_reloads(begun=notifier.reloading, over=notifier.ready)
    loop.add_signal_handler(signal.SIGHUP, lambda: asked.set() if has_hung_up() else reloads.ask())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # it has waited since the start
    async with reconciler, Oversight(reconciler, notifier, exposition, dropped):
        reasons: set[asyncio.Task[Any]] = {loop.create_task(asked.wait())}
        if once:
            reasons.add(loop.create_task(reconciler.settled()))
        ended, pending = await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in ended:
            task.result()


def _terminals() -> Callable[[], bool]:
    """Whether a terminal that this program was started on is gone, to be asked later.

    A terminal that goes tells those who run on it by the same signal by which an operator asks
    for new settings.
    """
    terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]
    return lambda: not all(map(os.isatty, terminals))
