"""The command's frame: the sub-commands with their options, and what an error looks like.

Only the module of the sub-command that is called is imported. `stat`, `pools` and `rm` are called often and by
scripts: what they import counts.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, NoReturn

import kvplug
from kvplug.cli import output
from kvplug.errors import KvplugError

__all__ = ["COMMANDS", "run"]

ABOUT: Final = "One KV-cache pool per host for every LLM engine process on it."
USAGE_STATUS: Final = 2
INTERRUPTED_STATUS: Final = 128 + 2
"""What a shell reports of a command that Ctrl-C has ended."""
HELP_WIDTH: Final = 100
"""Most columns of a help text, however wide the terminal is."""


class Command(NamedTuple):
    """A sub-command. Its function has its name, in *module* of this package, and takes the options by their names."""

    module: str
    summary: str
    about: str
    options: tuple[str, ...] = ()


COMMANDS: Final = {
    "doctor": Command(
        "surroundings",
        "Check this host, and suggest a fix for each fault.",
        "Check what kvplug needs here, and suggest a fix for each fault. Exit status 1: kvplug cannot work here.",
        ("--json",),
    ),
    "config": Command(
        "surroundings",
        "Every setting, its value and its source.",
        "Print every setting, its value and its source. Exit status 1: at least one setting cannot be used.",
        ("--json",),
    ),
    "pools": Command(
        "pools",
        "The pools on this host.",
        "List the pools on this host, with size, owner and number of attached processes.",
        ("--json",),
    ),
    "stat": Command(
        "pools",
        "A pool's statistics.",
        "Print a pool's statistics. This attaches no client, so it also works when the pool takes no more of them.",
        ("--pool", "--json"),
    ),
    "rm": Command(
        "pools",
        "Remove a pool.",
        "Remove a pool and free its memory. Refused while a process is attached, unless --force is given.",
        ("--pool", "--force"),
    ),
    "agent": Command(
        "agent",
        "Let other hosts read the pool.",
        "Serve the pool to other hosts until SIGTERM or Ctrl-C. Listening beyond loopback needs a key or TLS.",
        ("--pool", "--listen", "--cache-node"),
    ),
}
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "--pool": {"metavar": "NAME", "help": "Name of the pool. Default: the setting pool."},
    "--json": {"action": "store_true", "dest": "as_json", "help": "Print JSON."},
    "--force": {
        "action": "store_true",
        "help": "Remove it although processes are attached. They store nothing more.",
    },
    "--listen": {
        "metavar": "ADDRESS",
        "default": "",
        "help": "Address to listen on, host:port. Default: the setting agent_listen.",
    },
    "--cache-node": {
        "action": "store_true",
        "help": "Lend this pool: take over blocks that other hosts are about to evict.",
    },
}


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(output.width(), HELP_WIDTH) - 2)


class _Parser(argparse.ArgumentParser):
    """Options have to be written out, and whatever is printed goes through :mod:`kvplug.cli.output`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_Help)

    def print_help(self, file: Any = None) -> None:
        """On stdout."""
        output.say(self.format_help().rstrip())

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and the exit status of a wrong call."""
        output.complain(f"{message} (see `{self.prog} --help`)".replace("\n", "\\n"))
        sys.exit(USAGE_STATUS)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        output.say(f"kvplug {kvplug.__version__}")
        sys.exit(0)


def _parser() -> _Parser:
    parser = _Parser(prog="kvplug", description=ABOUT)
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="Print the version.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", prog="kvplug")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.summary, description=command.about)
        for option in command.options:
            own.add_argument(option, **_OPTIONS[option])
    return parser


def _joined(arguments: Iterable[str]) -> list[str]:
    """Each value in one word with its option: argparse would take one that begins with a dash for another option."""
    words, joined = iter(arguments), []
    for word in words:
        value = next(words, None) if "metavar" in _OPTIONS.get(word, ()) else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def _called(arguments: Iterable[str]) -> int:
    """The exit status of what the arguments ask for."""
    parser = _parser()
    options = vars(parser.parse_args(_joined(arguments)))
    name = options.pop("command")
    if name is None:
        parser.print_help()
        return USAGE_STATUS
    module = importlib.import_module(f"kvplug.cli.{COMMANDS[name].module}")
    return int(getattr(module, name)(**options))


def run(arguments: Iterable[str] | None = None) -> NoReturn:
    """The console script: an error of ours is one line on stderr and exit status 1, never a trace."""
    output.prepare()
    try:
        status = _called(sys.argv[1:] if arguments is None else arguments)
    except KvplugError as error:
        output.complain(str(error))
        status = 1
    except KeyboardInterrupt:
        status = INTERRUPTED_STATUS
    sys.exit(status)
