"""Two LoRA adapters and the plain model: three worlds, told apart by the adapters' content.

vLLM's CPU kernels let an adapter leak into plain requests of the same batch (also without kvplug), so requests run one
by one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvplug.identity.weights import SETTLED_S
from tests.lab.models import LLAMA, LoraSpec
from tests.vllm.common import Case, Control, agree, eventually, make_prompts, storable
from tests.vllm_lab.engine import InProcess

LLM = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
ADAPTERS = (LoraSpec(seed=1), LoraSpec(seed=2))


@pytest.fixture(scope="module")
def engines(start: Callable[..., InProcess]) -> dict[str, InProcess]:
    out = {"cold": start("cold", **LLM), "warm": start("warm", **LLM)}
    for engine in out.values():
        engine.ready()
    return out


@pytest.fixture(scope="module")
def witness(engines: dict[str, InProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    control = Control(LLAMA, tmp_path_factory.mktemp("lora-control") / "engine.log", **LLM)
    yield control
    control.close()


@pytest.fixture(scope="module")
def cases(witness: Control) -> list[Case]:
    """The same prompt three times: plain, with the first adapter, with the second."""
    for prompt in make_prompts(12, 96):
        try:
            found = [witness.pick([prompt], 1, lora=lora)[0] for lora in (None, *ADAPTERS)]
        except AssertionError:  # one of the three comes near a tie
            continue
        assert len({case.tokens for case in found}) == 3, "the adapters change what is said"
        return found
    raise AssertionError("no prompt keeps clear of a tie in all three worlds")


def settle(engine: InProcess, case: Case, **more: str) -> None:
    """Asks for something short until the adapter's content is known: until then nothing is reused, by design."""
    probe = Case(case.prompt[:100], (0,), lora=case.lora)

    def known() -> bool:
        engine.do("reset")
        engine.each([probe.request(**more)])
        engine.do("reset")
        return bool(engine.each([probe.request(**more)])[0]["external"])

    eventually("the adapter's content is known", known)


def test_adapters_never_read_each_others_blocks_and_find_their_own(
    engines: dict[str, InProcess], cases: list[Case]
) -> None:
    cold, warm = engines["cold"], engines["warm"]
    for case in cases:
        settle(cold, case)
        cold.do("reset")
        (record,) = cold.each([case.request()])
        agree([case], [record])
        assert record["external"] <= storable(100), "another adapter's blocks were read"
    for case in reversed(cases):
        settle(warm, case)
        warm.do("reset")
        (record,) = warm.each([case.request()])
        agree([case], [record])
        assert record["external"] == storable(len(case.prompt))


def put(folder: Path, case: Case) -> None:
    """Another adapter takes the place of what lay there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(str(case.lora), folder)


def found(engine: InProcess, case: Case, **more: Any) -> None:
    """Waits until the whole prompt comes from the pool; what is said is right all the while."""

    def whole() -> bool:
        engine.do("reset")
        (record,) = engine.each([case.request(**more)])
        agree([case], [record])
        return bool(record["external"] == storable(len(case.prompt)))

    eventually("the prompt comes from the pool", whole)


def test_an_adapter_is_known_by_its_content_not_by_its_name_or_path(
    engines: dict[str, InProcess], cases: list[Case], tmp_path: Path
) -> None:
    """The second adapter's files in another place are the same adapter, also under the name that another has."""
    warm = engines["warm"]
    second = cases[2]
    shutil.copytree(str(second.lora), tmp_path / "moved")
    found(warm, second, lora=str(tmp_path / "moved"))
    shutil.copytree(str(second.lora), tmp_path / "again")
    found(warm, second, lora=str(tmp_path / "again"), lora_name="adapter1")


def test_each_step_of_a_training_loop_is_an_adapter_of_its_own(
    engines: dict[str, InProcess], cases: list[Case], tmp_path: Path
) -> None:
    """All steps are written to one folder; each is loaded under a name and id of its own, and found again."""
    warm, folder = engines["warm"], tmp_path / "policy"
    for step, case in enumerate((cases[1], cases[2], cases[1])):
        put(folder, case)
        found(warm, case, lora=str(folder), lora_name=f"step-{step}", lora_id=100 + step)


def test_an_adapter_that_was_loaded_ahead_is_known_to_its_first_request(
    engines: dict[str, InProcess], cases: list[Case], tmp_path: Path
) -> None:
    """As servers load adapters; its files may have been written a moment ago."""
    cold, case = engines["cold"], cases[1]
    found(engines["warm"], case)
    put(tmp_path / "new", case)
    mine = case.request(lora=str(tmp_path / "new"), lora_name="ahead", lora_id=200)
    assert cold.do("add_lora", request=mine)
    cold.do("reset")
    (record,) = cold.each([mine])
    agree([case], [record])
    assert record["external"] == storable(len(case.prompt))


def test_an_adapter_that_the_engine_reads_again_is_what_lies_there_then(
    engines: dict[str, InProcess], cases: list[Case], tmp_path: Path
) -> None:
    """The engine keeps two; a third takes the place of one, whose folder holds another adapter when it is needed."""
    warm, folder = engines["warm"], tmp_path / "one"
    mine = {"lora": str(folder), "lora_name": "read-again", "lora_id": 300}
    put(folder, cases[1])
    found(warm, cases[1], **mine)
    agree(cases[1:], warm.each([case.request() for case in cases[1:]]))
    put(folder, cases[2])
    found(warm, cases[2], **mine)


def test_an_adapter_that_is_replaced_between_a_look_at_it_and_its_load_gets_its_own_answer(
    engines: dict[str, InProcess], cases: list[Case], tmp_path: Path
) -> None:
    """Blocks of what lay there were loaded for the request; they are thrown away, and nothing of them stays."""
    warm, folder = engines["warm"], tmp_path / "two"
    found(warm, cases[2])
    put(folder, cases[2])
    mine = {"lora": str(folder), "lora_name": "replaced"}
    ids = iter(range(400, 500))

    def foretold() -> bool:
        """Whether blocks of the pool are on their way for an adapter that the worker has not read."""
        mine["lora_id"] = next(ids)  # type: ignore[assignment]
        warm.do("reset")
        names = warm.do("add", requests=[cases[2].request(**mine)])
        warm.do("step")
        if warm.do("states", names=names) != ["WAITING_FOR_REMOTE_KVS"]:
            agree([cases[2]], warm.do("wait", names=names))
            return False
        put(folder, cases[1])
        agree([cases[1]], warm.do("wait", names=names))
        return True

    eventually("what lies there is settled, and foretold", foretold)
    again = {**mine, "lora_name": "replaced"}
    agree([cases[1]], warm.each([cases[1].request(**again)]))
    found(warm, cases[1], **again)


def test_where_steps_overlap_nothing_is_loaded_for_an_adapter_that_the_worker_has_yet_to_read(
    engines: dict[str, InProcess], start: Callable[..., InProcess], cases: list[Case], tmp_path: Path
) -> None:
    """As by default on devices. vLLM could not throw away what was computed with such blocks, and would end."""
    found(engines["warm"], cases[2])
    booting = start("overlapping", overlapping_steps=True, **LLM)
    folder = tmp_path / "three"
    put(folder, cases[2])
    engine = booting.ready()
    assert engine.do("info")["batches"] > 1
    newest = max(file.stat().st_ctime for file in folder.iterdir())
    eventually("its files are settled", lambda: time.time() > newest + 2 * SETTLED_S)
    for number in range(500, 505):
        mine = {"lora": str(folder), "lora_name": f"number-{number}", "lora_id": number}
        engine.do("reset")
        names = engine.do("add", requests=[cases[2].request(**mine)])
        engine.do("step")
        assert engine.do("states", names=names) != ["WAITING_FOR_REMOTE_KVS"]
        agree([cases[2]], engine.do("wait", names=names))
        found(engine, cases[2], **mine)
