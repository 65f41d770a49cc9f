"""`completion`: what teaches a shell the commands, options and sessions."""

from __future__ import annotations

import click

from reconciler.console import pass_common

PROGRAM = "pi-reconciler"

_BASH = """\
# Completion of pi-reconciler, for bash 4.4 and newer.
_pi_reconciler() {
    local IFS=$'\\n' kind value
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            plain) COMPREPLY+=("$value") ;;
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
        esac
    done < <(
        env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" \\
            _PI_RECONCILER_COMPLETE=bash_complete "$1" 2>/dev/null
    )
}
complete -o nosort -F _pi_reconciler pi-reconciler
"""


@click.command(short_help="Print what completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_common
def completion(_: object, shell: str) -> None:
    """Print a script that completes commands, options and session ids with the Tab key.

    \b
    bash:  mkdir -p ~/.local/share/bash-completion/completions
           pi-reconciler completion bash > \\
             ~/.local/share/bash-completion/completions/pi-reconciler
           (needs the package bash-completion; or in ~/.bashrc:
           eval "$(pi-reconciler completion bash)")
    zsh:   in ~/.zshrc, below compinit:
           eval "$(pi-reconciler completion zsh)"
    fish:  mkdir -p ~/.config/fish/completions
           pi-reconciler completion fish > ~/.config/fish/completions/pi-reconciler.fish

    It counts from the next shell on.
    """  # noqa: D301 - click wants the real character
    click.echo(_BASH if shell == "bash" else _of_click(shell), nl=False)


def _of_click(shell: str) -> str:
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    group = click.get_current_context().find_root().command
    if made is None:
        raise AssertionError(f"click knows {shell}")
    return made(group, {}, PROGRAM, "_PI_RECONCILER_COMPLETE").source()
