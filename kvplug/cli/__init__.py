"""The `kvplug` command: one module per group of sub-commands."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script."""
    from kvplug.cli.app import run

    run()
