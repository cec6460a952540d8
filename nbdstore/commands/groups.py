"""How groups of commands list themselves in their help."""

from __future__ import annotations

import click


class OrderedGroup(click.Group):
    """A group whose help lists commands as they are written: what comes first is needed first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
