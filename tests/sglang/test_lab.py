"""The lab itself: a server without kvplug is whole, shows what it cached, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.lab.env import EngineError
from tests.lab.models import LFM2, MELLUM, MLA, ModelSpec, model_dir
from tests.sglang.common import Control, serve
from tests.sglang_lab.models import MLA_OVERRIDES
from tests.sglang_lab.server import SglangServer
from tests.vllm.common import MIN_MARGIN, make_prompts


def test_forked_server_answers_like_one_started_cold(boot: Callable[..., SglangServer], control: Control) -> None:
    cold = boot("cold", pool=None, cold=True)
    cases = control.pick(2, seed=1)
    roles = control.server.roles()
    assert set(roles) == {"api", "scheduler", "detokenizer"} == set(cold.ready().roles())
    assert control.server.ask("tests.sglang_lab.inside:pid") == roles["scheduler"]
    assert cold.ask("tests.sglang_lab.inside:pid") == cold.roles()["scheduler"]
    assert [answer.cached for answer in serve(cold, cases)] == [0, 0]
    again = serve(cold, cases)
    assert [answer.cached for answer in again] == [case.whole for case in cases]
    assert all(0 < answer.ttft_s <= answer.total_s for answer in again)


def test_server_without_kvplug_has_nothing_of_it(control: Control) -> None:
    assert not control.server.ask("tests.sglang_lab.inside:modules", prefix="kvplug")
    assert not [name for name in control.server.metrics() if name.startswith("kvplug_")]
    assert "kvplug" not in control.server.get("/server_info")


def test_errors_say_what_happened(boot: Callable[..., SglangServer], control: Control) -> None:
    with pytest.raises(EngineError, match="not a function there"):
        control.server.ask("tests.sglang_lab.inside:fail", message="not a function there")
    with pytest.raises(EngineError, match="longer than the model's context length"):
        control.server.generate([10] * 5000)
    broken = boot("broken", pool=None, arguments=["--page-size", "none"])
    with pytest.raises(EngineError, match="invalid int value: 'none'"):
        broken.ready()


def test_killed_server_leaves_no_process_and_starts_again(boot: Callable[..., SglangServer], control: Control) -> None:
    first = boot("killed", pool=None).ready()
    family = first.family()
    assert len(family) >= 3
    first.kill_all()
    assert not [p for p in family if p.is_running()]
    second = first.again()
    try:
        serve(second.ready(), control.pick(1, seed=2))
    finally:
        second.close()
    assert not second.family()


def computed_elsewhere(model: ModelSpec, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens by transformers, and the least distance to a runner-up in log-probability."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir(model))
    if model is MLA:
        config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **MLA_OVERRIDES["rope_scaling"]}
    network: Any = AutoModelForCausalLM.from_pretrained(model_dir(model), config=config, dtype=torch.float32)
    out = network.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).log_softmax(-1).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


@pytest.mark.parametrize("model", [MLA, MELLUM, LFM2], ids=lambda model: model.family)
def test_what_the_lab_adds_computes_the_right_tokens(boot: Callable[..., SglangServer], model: ModelSpec) -> None:
    """Without an accelerator SGLang has latent attention, windows and short convolutions only with the lab's help."""
    with boot(f"extra-{model.family}", model, pool=None, page_size=1 if model is LFM2 else 64).ready() as server:
        seen = 0
        for prompt in make_prompts(3, seed=3, tokens=(200, 300)):
            expected, margin = computed_elsewhere(model, prompt, 6)
            if margin < MIN_MARGIN:
                continue
            seen += 1
            longer = prompt + expected[:4]
            assert server.generate(prompt, 6).tokens == expected
            answer = server.generate(longer, 2)  # the same, with what is in the cache
            assert answer.tokens == expected[4:]
            assert answer.cached >= (0 if model is LFM2 else 192)
        assert seen >= 1
