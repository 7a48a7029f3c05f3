"""Runs real vLLM engines for tests, the benches and the demo, and leaves nothing of them behind.

Two ways to run one:

* :class:`InProcess`: ``LLM()`` in a process of its own behind ``driver.py``'s line protocol. Starts in seconds, can be
  stepped, shows block ids and device bytes. Scheduler and (with one rank) worker are the same process.
* :class:`Server`: ``vllm serve`` on a free loopback port, with its API server, engine core and worker processes.

Both start in their own process group without waiting (``ready()`` waits, with a deadline), so that several can start at
once, and both are context managers that kill the group and unlink what it left in /dev/shm. A pool belongs to the test:
:func:`tests.lab.env.temporary_pool` names one and removes it.
"""

from __future__ import annotations

from tests.vllm_lab.env import base_env, matrix_path
from tests.vllm_lab.inprocess import LLM_DEFAULTS, InProcess
from tests.vllm_lab.served import SERVE_ARGUMENTS, Completion, Server, parse_metrics

__all__ = [
    "LLM_DEFAULTS",
    "SERVE_ARGUMENTS",
    "Completion",
    "InProcess",
    "Server",
    "base_env",
    "matrix_path",
    "parse_metrics",
]
