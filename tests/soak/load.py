"""Clients: each asks one engine after another case, and judges what comes back."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from tests.lab.env import EngineError
from tests.sglang_lab.server import SglangServer
from tests.soak.cases import Case
from tests.soak.findings import Findings
from tests.soak.seats import Life, Seat

__all__ = ["HUNG_S", "ask_once", "client", "judge"]

HUNG_S: Final = 90.0
"""An engine that lives and says nothing for so long hangs. Three of them share two cores, and are stopped at times."""
GIVE_UP: Final = 0.1
"""Share of the requests that their client does not wait for."""
GIVE_UP_S: Final = 0.8
THINK_S: Final = 0.15
"""Mean of what a client waits before its next request."""
FAVOURITES: Final = 6
"""Cases that are asked for again and again for a while, as conversations are."""
MOVE_ON: Final = 0.15
"""How likely it is that after a request other cases become the favourites."""


def client(seat: Seat, seed: int, over: threading.Event) -> None:
    """Asks until *over*; a thread's whole life."""
    rng = random.Random(seed)
    favourites = rng.sample(seat.cases, min(FAVOURITES, len(seat.cases)))
    while not over.is_set():
        life = seat.wait_up(1.0)
        if life is None:
            continue
        if rng.random() < MOVE_ON:
            favourites = rng.sample(seat.cases, min(FAVOURITES, len(seat.cases)))
        case = rng.choice(favourites)
        if rng.random() < GIVE_UP:
            _ask_and_hang_up(life, case, rng.uniform(0.0, GIVE_UP_S), seat.findings)
        else:
            ask_once(seat, life, case)
        over.wait(rng.expovariate(1 / THINK_S))


def ask_once(seat: Seat, life: Life, case: Case) -> bool:
    """One request, asked and judged; whether it was answered right."""
    findings, server = seat.findings, life.server
    findings.add("requests")
    life.asking.add(threading.get_ident())
    stops, began = life.stops, time.monotonic()
    try:
        if isinstance(server, SglangServer):
            answer: Any = server.generate(case.prompt, len(case.tokens), timeout_s=HUNG_S)
        else:
            answer = server.complete(case.prompt, len(case.tokens), timeout_s=HUNG_S)
    except EngineError as error:
        if life.doomed.is_set():
            findings.add("lost")
            return False
        where = f"{seat.name} #{life.number}, case {case.number} ({len(case.prompt)} tokens), "
        took = time.monotonic() - began
        if isinstance(error.__cause__, TimeoutError):
            findings.find("hung", f"{where}no answer for {took:.0f} s: {error}")
        else:
            findings.find("unexplained", f"{where}after {took:.1f} s: {error}")
        return False
    finally:
        life.asking.discard(threading.get_ident())
    took = time.monotonic() - began
    verdict = judge(case.tokens, answer.tokens, doomed=life.doomed.is_set())
    if verdict == "right":
        life.right += 1
        findings.answered(took if stops == life.stops else 0.0)
    elif verdict == "lost":
        findings.add("lost")
    else:
        findings.find("wrong", _described(seat, life, case, answer))
    return verdict == "right"


def judge(expected: Sequence[int], got: Sequence[int], *, doomed: bool) -> str:
    """ "right", "wrong", or "lost": cut short by the engine's death, but right until then."""
    if tuple(got) == tuple(expected):
        return "right"
    if doomed and tuple(got) == tuple(expected[: len(got)]):
        return "lost"
    return "wrong"


def _described(seat: Seat, life: Life, case: Case, answer: Any) -> str:
    at = next((i for i, (x, y) in enumerate(zip(case.tokens, answer.tokens, strict=False)) if x != y), "the end")
    details = getattr(answer, "details", None) or {}
    return (
        f"{seat.name} #{life.number}, {time.monotonic() - life.ready_at:.1f} s after its start, case {case.number}: "
        f"{len(case.prompt)} tokens, {answer.cached} of them not computed {details or ''}; differs from token {at} on: "
        f"{list(answer.tokens)} for {list(case.tokens)}; finish {getattr(answer, 'finish', None)}"
    )


def _ask_and_hang_up(life: Life, case: Case, after_s: float, findings: Findings) -> None:
    """A client that goes away before the answer is whole: the engine aborts the request."""
    findings.add("given_up")
    sglang = isinstance(life.server, SglangServer)
    body: dict[str, Any]
    if sglang:
        sampling = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
        body = {"input_ids": list(case.prompt), "sampling_params": sampling, "stream": True}
    else:
        body = {"model": "m", "prompt": list(case.prompt), "max_tokens": 64, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", life.server.port, timeout=HUNG_S)
    try:
        connection.request(
            "POST", "/generate" if sglang else "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        time.sleep(after_s)
    except OSError:  # it was killed; those who wait for their answers will tell if it was not
        return
    finally:
        connection.close()
