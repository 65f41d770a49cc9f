"""`ls`: the sessions, one row each."""

from __future__ import annotations

import click

from reconciler.console import Common, json_option, pass_common, print_json, print_lines, say


@click.command(short_help="List the sessions (alias: ps).")
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
        print_json(rows)
    else:
        print_lines(screens.table(rows))
    if not rows and not manager.sessions_dir.is_dir():
        say(f"there is no folder {manager.sessions_dir}")
