"""`inspect`: all that is known of a session."""

from __future__ import annotations

import click

from reconciler.console import (
    Common,
    complete_session,
    json_option,
    pass_common,
    print_json,
    print_lines,
)


@click.command(short_help="Tell all that is known of a session.")
@click.argument("sid", shell_complete=complete_session)
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
        print_json(screens.everything(finding, manager.sessions_dir))
    else:
        print_lines(screens.told(finding, manager.sessions_dir))
