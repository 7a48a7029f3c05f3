"""The process that fetches for one engine process: started by :mod:`kvplug.remote.process`, and gone when that is.

It has a store of its own on the same pool, so what it was writing when it died is reclaimed like anybody's.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from typing import Final

import numpy as np

from kvplug.config import GivenConfig
from kvplug.errors import KvplugError
from kvplug.remote.messages import Begin, Begun, Channel, ChannelError, Fetch, Fetched, Found, Problem, WhoHas, expected
from kvplug.remote.pool_blocks import PoolExchange
from kvplug.remote.sources import Holders, Sources
from kvplug.store import KvStore

__all__ = ["main"]

BEGIN_S: Final = 30.0
PARENT_LOOK_S: Final = 1.0
CLOSE_S: Final = 0.5
ANSWER_S: Final = 5.0
"""How long an answer may stand in a socket that nobody reads."""


def main() -> None:
    """``PARENT FD…``: answer on these sockets until one is hung up or the process PARENT is gone."""
    parent, *descriptors = map(int, sys.argv[1:])
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    channels = [Channel(socket.socket(fileno=fd)) for fd in descriptors]
    status = 1
    try:
        try:
            _serve(expected(channels[0].receive(time.monotonic() + BEGIN_S), Begin), channels)
        except KvplugError as error:
            channels[0].send(Problem(str(error), goes_on=False), time.monotonic() + ANSWER_S)
        status = 0
    except ChannelError:
        pass  # whoever started this is gone already
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)  # no thread is waited for: each may stand in a call for as long as its deadline says


def _watch(parent: int) -> None:
    """End this process with the one that started it, also where others have copies of the sockets."""
    while os.getppid() == parent:
        time.sleep(PARENT_LOOK_S)
    os._exit(1)


def _serve(begin: Begin, channels: list[Channel]) -> None:
    config = GivenConfig(**begin.settings)
    with KvStore(config=config, create=False, _join=(begin.pool_uuid, 0)) as store:
        sources = Holders(PoolExchange(store), config)
        over = threading.Event()
        for channel in channels[1:]:
            threading.Thread(target=_answer, args=(channel, sources, over), daemon=True).start()
        channels[0].send(Begun(), time.monotonic() + ANSWER_S)
        threading.Thread(target=_answer, args=(channels[0], sources, over), daemon=True).start()
        over.wait()
        closing = threading.Thread(target=sources.close, daemon=True)
        closing.start()
        closing.join(CLOSE_S)  # what does not hang up by then ends with the process


def _answer(channel: Channel, sources: Sources, over: threading.Event) -> None:
    """Answer one question after the other, until the other end hangs up: that ends everything."""
    try:
        while True:
            question = channel.receive()
            answer: Found | Fetched | Problem
            try:
                answer = _answer_to(question, sources)
            except KvplugError as error:
                answer = Problem(str(error))
            except BaseException:  # the engine's process counts it, says it, and starts another one
                channel.send(Problem(traceback.format_exc(), goes_on=False), time.monotonic() + ANSWER_S)
                raise
            channel.send(answer, time.monotonic() + ANSWER_S)
    except ChannelError:
        pass
    finally:
        over.set()


def _answer_to(question: object, sources: Sources) -> Found | Fetched:
    if isinstance(question, WhoHas):
        found, silent = sources.who_has(_keys(question.keys), question.deadline)
        return Found([(standing, have.tobytes()) for standing, have in found], silent)
    if isinstance(question, Fetch):
        codes, standing = sources.fetch(question.address, _keys(question.keys), question.deadline)
        return Fetched(codes.tobytes(), standing)
    raise ChannelError(f"nobody asks for a {type(question).__name__} here")


def _keys(raw: bytes) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)
