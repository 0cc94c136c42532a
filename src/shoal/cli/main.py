"""`shoal`: the command line. Each subcommand lives in a file of its own and is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import MappingProxyType

import click

from shoal._version import __version__
from shoal.errors import ShoalError, nearest

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "train": "Train a job.",
        "join": "Train along in an elastic run that goes on elsewhere.",
        "price": "Say what a plan would send, without a run.",
        "secrets": "Make keys for parameter servers.",
        "export": "Write a run's model as one file.",
        "report": "Show what happened in a run.",
        "doctor": "Say what this machine can do.",
    }
)


class _Lazy(click.Group):
    """Imports a command's module only when it is needed: torch alone takes a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            ctx.fail(f"unknown command '{cmd_name}'{nearest(cmd_name, COMMANDS)}; expected {', '.join(COMMANDS)}")
        command = getattr(importlib.import_module(f"shoal.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy)
@click.version_option(__version__, prog_name="shoal")
def cli() -> None:
    """Train one PyTorch model on the machines you have."""


def main() -> None:
    """Run the command line: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped at once", err=True)
        sys.exit(130)
    except ShoalError as error:
        click.echo(f"shoal: {error}", err=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
