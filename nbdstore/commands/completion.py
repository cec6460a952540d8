"""``nbdstore completion``: the script that makes a shell complete commands and volume names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_NBDSTORE_COMPLETE"
"""The environment variable by which the shell's script asks nbdstore what comes next."""


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and volume names.

    \b
    Examples:
      source <(nbdstore completion bash)       # in ~/.bashrc
      source <(nbdstore completion zsh)        # in ~/.zshrc, after compinit
      nbdstore completion fish | source        # in ~/.config/fish/config.fish
    """
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(ctx.find_root().command, {}, "nbdstore", VARIABLE).source())
