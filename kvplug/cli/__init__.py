"""The `kvplug` command: one module per group of sub-commands."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script."""
    import gc

    gc.disable()  # a command ends before cycles take room; the agent, which goes on, turns it on again
    from kvplug.cli.app import run

    run()
