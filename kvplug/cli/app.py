"""The command's frame: the sub-commands, and what an error looks like."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import kvplug
from kvplug.cli import agent, output, pools, surroundings
from kvplug.errors import KvplugError

__all__ = ["app", "run"]

app = typer.Typer(
    name="kvplug",
    help="One KV-cache pool per host for every LLM engine process on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        output.say(f"kvplug {kvplug.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One KV-cache pool per host for every LLM engine process on it."""


app.command("doctor", short_help="Check this host, and suggest a fix for each fault.")(surroundings.doctor)
app.command("config", short_help="Every setting, its value and its source.")(surroundings.config)
app.command("pools", short_help="The pools on this host.")(pools.pools)
app.command("stat", short_help="A pool's statistics.")(pools.stat)
app.command("rm", short_help="Remove a pool.")(pools.rm)
app.command("agent", short_help="Let other hosts read the pool.")(agent.agent)


def run() -> None:
    """The console script: an error of ours is one line on stderr and exit status 1, never a trace."""
    output.prepare()
    try:
        app()
    except KvplugError as error:
        output.complain(str(error))
        sys.exit(1)
    except OSError as error:  # of --help and --version, which typer prints
        if error.filename is not None:
            raise
        output.give_up()
        output.complain(f"the output can't be written: {error.strerror}")
        sys.exit(1)
