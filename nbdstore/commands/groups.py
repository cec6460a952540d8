"""How groups of commands list themselves in their help, and find their commands."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class OrderedGroup(click.Group):
    """A group whose help lists commands as they are written: what comes first is needed first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class LazyGroup(OrderedGroup):
    """A group that imports a command when it is asked for: most runs need one of them.

    Arguments:
        places: name of a command -> where it is, "MODULE.ATTRIBUTE"; in the order of the help.
    """

    def __init__(self, *args: Any, places: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._places, *(name for name in self.commands if name not in self._places)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._places:
            self._load(cmd_name)
        elif cmd_name not in self.commands:
            for name in self._places:  # click suggests one of those that it finds in `commands`
                self._load(name)
        return super().get_command(ctx, cmd_name)

    def _load(self, name: str) -> None:
        if name not in self.commands:
            module, _, attribute = self._places[name].rpartition(".")
            self.add_command(getattr(importlib.import_module(module), attribute), name)
