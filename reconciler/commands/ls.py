"""`ls`: the sessions, one row each."""

from __future__ import annotations

import os
import sys

import click

from reconciler.console import (
    Common,
    check_reader,
    end_with_reader,
    json_option,
    pass_common,
    print_json,
    print_lines,
    say,
)


@click.command(short_help="List the sessions (alias: ps).")
@click.option(
    "-w", "--watch", is_flag=True, help="Stay, and show every change as it happens, until Ctrl-C."
)
@json_option
@pass_common
def ls(given: Common, *, watch: bool, as_json: bool) -> None:
    """List the sessions, one row each (alias: ps).

    Looks at the folder and the processes itself, and needs no running daemon. With --watch, on
    a terminal, the table stays and follows what happens; in a pipe, with --json, or where TERM
    is dumb, each session is a line of JSON when it is found, and again whenever it has changed
    (phase `absent`: it is gone).

    \b
    For a script:                     pi-reconciler ls --json | jq -r '.[].sid'
    Keep an eye on them:              pi-reconciler ls --watch
    Wait until demo is ready:         pi-reconciler ls --watch --json | \\
                                        grep -m1 '"sid": "demo", "phase": "ready"'
    """  # noqa: D301 - click wants the real character
    if watch:
        _watch(given, as_json=as_json)
        return
    from reconciler import screens

    manager = given.manager()
    rows = [screens.row(finding, manager.sessions_dir) for finding in manager.find()]
    if as_json:
        print_json(rows)
    else:
        print_lines(screens.table(rows))
    if not rows and not manager.sessions_dir.is_dir():
        say(f"there is no folder {manager.sessions_dir}")


def _watch(given: Common, *, as_json: bool) -> None:
    """Look on, as a reconciler that does nothing."""
    import asyncio
    import signal

    from reconciler.controller import Reconciler
    from reconciler.live import draw_table, print_changes
    from reconciler.logs import make_logger

    reconciler = Reconciler(
        given.manager(),
        resync=given.settings.resync,
        dry_run=True,
        logger=make_logger(None, "error", "json"),
    )
    can_draw = sys.stdout and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if as_json or not can_draw:
        end_with_reader()
        if not reconciler.manager.sessions_dir.is_dir():
            say(f"there is no folder {reconciler.manager.sessions_dir}; waiting for it")
        asyncio.run(print_changes(reconciler, click.echo, check_reader))
    else:
        try:
            asyncio.run(draw_table(reconciler, colors=given.colors))
        except asyncio.CancelledError as error:  # by a signal; the terminal is as it was
            signal.raise_signal(error.args[0])
