"""Runs other projects' tests against kvplug.

    python -m tests.upstream.run                    all of them
    python -m tests.upstream.run vllm [GROUP ...]   one half, or some of its groups

Exit status 1 where a test did not end as its expectations file (vllm.toml, …) says.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

HALVES = tuple(name for name in ("vllm", "sglang") if Path(__file__).with_name(f"{name}.toml").exists())


def main() -> int:
    """Run the halves that were asked for."""
    arguments = argparse.ArgumentParser(prog="python -m tests.upstream.run", description="other projects' tests")
    arguments.add_argument("half", nargs="?", choices=HALVES, help="all without it")
    arguments.add_argument("groups", nargs="*", help="some of its groups")
    options = arguments.parse_args()
    status = 0
    for half in [options.half] if options.half else HALVES:
        status |= importlib.import_module(f"tests.upstream.{half}").main(options.groups)
    return status


if __name__ == "__main__":
    sys.exit(main())
