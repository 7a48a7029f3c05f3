"""Two LoRA adapters and the plain model: three worlds, told apart by the adapters' content.

vLLM's CPU kernels let an adapter leak into plain requests of the same batch (also without kvplug), so requests run one
by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vllm.common import Case, Control, agree, eventually, make_prompts, storable
from tests.vllm_lab.engine import InProcess
from tests.vllm_lab.models import LLAMA, LoraSpec

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


def test_an_adapter_is_known_by_its_content_not_by_its_name_or_path(
    engines: dict[str, InProcess], cases: list[Case], tmp_path: Path
) -> None:
    """The second adapter's files in another place are the same adapter. A name given twice is none at all."""
    warm = engines["warm"]
    second = cases[2]
    moved = tmp_path / "moved"
    shutil.copytree(str(second.lora), moved)
    case = Case(second.prompt, second.tokens, lora=str(moved))
    settle(warm, case)
    warm.do("reset")
    (record,) = warm.each([case.request()])
    agree([case], [record])
    assert record["external"] == storable(len(case.prompt)), "the same content is the same adapter"

    again = tmp_path / "again"
    shutil.copytree(str(second.lora), again)
    case = Case(second.prompt, second.tokens, lora=str(again))
    for _ in range(3):
        warm.do("reset")
        (record,) = warm.each([case.request(lora_name="adapter1")])  # the name that the first adapter has here
        agree([case], [record])
        assert record["external"] == 0, "what the engine holds under a name given twice can't be told from outside"
