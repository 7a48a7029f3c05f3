"""When an engine began: weights that change on the disk after that are not what it has loaded."""

from __future__ import annotations

import time

STARTED_KEY = "kvplug_started_ns"
"""Entry of the connector's extra configuration: wall clock, in ns, before the engine began to load its weights."""


def started_ns() -> int:
    """Now, for :data:`STARTED_KEY`."""
    return time.time_ns()


PROCESS_STARTED_NS = time.time_ns()
"""When this module was imported, which the plugin does before an engine's process loads anything."""
