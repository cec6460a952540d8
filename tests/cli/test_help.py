"""The help: complete, readable, and with examples that work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from nbdstore import __version__
from nbdstore.cli import cli


def every_command(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from every_command(child, (*path, name))


COMMANDS = list(every_command())
EXAMPLES = [
    line.strip()
    for _, command in COMMANDS
    for paragraph in (command.help or "").replace("\\\n", " ").split("\n\n")
    for line in paragraph.splitlines()
    if "\b" in paragraph and "nbdstore " in line
]


def help_of(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=[" ".join(path) or "nbdstore" for path, _ in COMMANDS]
)
def test_every_command_and_option_is_explained(
    path: tuple[str, ...], command: click.Command
) -> None:
    text = help_of(path)
    assert command.help
    assert "..." not in (command.get_short_help_str(limit=200))
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "help":
            assert option.help or option.type.name == "choice", option.name
    assert max(map(len, text.splitlines())) <= 80


def test_the_list_shows_what_is_needed_first_first() -> None:
    text = help_of(())
    names = ["pool", "volume", "serve", "import", "export", "capacity", "check", "completion"]
    positions = [text.index(f"\n  {name} ") for name in names]
    assert positions == sorted(positions)


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_is_a_command_line_that_can_be_read(line: str) -> None:
    command_line = line.split(" | ")[-1 if line.startswith("zst") else 0]
    command_line = re.split(" [<>] ", command_line)[0]
    words = shlex.split(command_line.removeprefix("source <(").replace(")", ""), comments=True)
    assert words[0] == "nbdstore"
    group: click.Command = cli
    context: click.Context | None = None
    words = words[1:]
    while isinstance(group, click.Group):
        context = group.make_context(group.name, words, parent=context)
        words = [*context._protected_args, *context.args]
        if not words and group.invoke_without_command:
            return
        _, child, words = group.resolve_command(context, words)
        assert child is not None
        group = child
    group.make_context(group.name, words, parent=context)


def test_a_command_is_listed_by_its_name() -> None:
    assert [path[-1] for path, _ in COMMANDS[1:]] == [command.name for _, command in COMMANDS[1:]]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 15


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).stdout == f"nbdstore {__version__}\n"


def test_no_command_shows_the_help() -> None:
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 2
    assert "First steps:" in result.stderr
