"""What a request's keys take in besides its tokens, and which requests are not cached at all. On vLLM's own Request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.inputs.engine import mm_input
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItems, PlaceholderRange
from vllm.v1.request import Request

from kvplug.adapters.vllm import compat_requests
from kvplug.adapters.vllm.requests import NotYetKnownError, open_chain
from kvplug.errors import NamespaceError

ROOT = b"r" * 32
TOKENS = list(range(64))


PROCESSOR = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(multimodal_config=None)))
"""vLLM's, of an engine whose user has set nothing of media."""


def request(**more: Any) -> Request:
    params = SamplingParams(max_tokens=4)
    return Request("r", list(TOKENS), params, None, **more)


def keys(made: Request, lora: Any = None, trust: bool = False, **more: bool) -> bytes:
    chain = open_chain(made, ROOT, 16, lora_identity=lambda _: lora, trust_mm_ids=trust, **more)
    chain.extend(TOKENS)
    return chain.step_keys.tobytes()


def image(name: str, offset: int = 20, length: int = 20) -> dict[str, Any]:
    position = PlaceholderRange(offset=offset, length=length)
    feature = MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=position)
    return {"mm_features": [feature]}


LORA = LoRARequest("adapter", 1, "/adapters/a")
FIRST, SECOND = "a" * 64, "b" * 64


def test_everything_that_decides_bytes_is_in_the_keys() -> None:
    """Salt, adapter, image and the image's place each give keys of their own."""
    made = [
        keys(request()),
        keys(request(cache_salt="one")),
        keys(request(cache_salt="two")),
        keys(request(lora_request=LORA), lora=b"1" * 32),
        keys(request(lora_request=LORA), lora=b"2" * 32),
        keys(request(cache_salt="one", lora_request=LORA), lora=b"1" * 32),
        keys(request(**image(FIRST))),
        keys(request(**image(SECOND))),
        keys(request(**image(FIRST, offset=21))),
    ]
    assert len(set(made)) == len(made)


def test_a_salt_hides_every_step_and_an_image_only_those_from_its_own_on() -> None:
    """Keys are chained: what is before the image is shared with the request without one."""
    plain, salted, seen = keys(request()), keys(request(cache_salt="s")), keys(request(**image(FIRST)))
    assert all(plain[i : i + 32] != salted[i : i + 32] for i in range(0, 128, 32))
    assert plain[:32] == seen[:32]
    assert plain[32:64] != seen[32:64]


def test_equal_requests_have_equal_keys() -> None:
    """Otherwise nothing would ever be found again."""
    for more in ({}, {"cache_salt": "x"}, image(FIRST)):
        assert keys(request(**more)) == keys(request(**more))


@pytest.mark.parametrize("name", ["my-image", "7", "request-3-image-0", "A" * 64, "a" * 63])
def test_an_identifier_that_is_not_a_content_hash_is_not_trusted(name: str) -> None:
    """A counter that starts again after a restart would make another image hit."""
    with pytest.raises(NamespaceError, match="multimodal"):
        keys(request(**image(name)))
    assert keys(request(**image(name)), trust=True)


def test_an_adapter_that_is_not_identified_is_not_cached() -> None:
    """Not by its name, and not as if there were none. What may be known later is told from what never will."""
    with pytest.raises(NotYetKnownError, match="LoRA"):
        keys(request(lora_request=LORA))

    def never(_: Any) -> bytes:
        raise NamespaceError("it changed")

    with pytest.raises(NamespaceError, match="it changed") as found:
        open_chain(request(lora_request=LORA), ROOT, 16, lora_identity=never, trust_mm_ids=False)
    assert not isinstance(found.value, NotYetKnownError)


def test_a_session_whose_tokens_may_be_replaced_is_not_cached() -> None:
    """A streaming session trims what it has generated."""
    with pytest.raises(NamespaceError, match="streaming"):
        keys(request(resumable=True))


def test_an_extra_key_of_the_engine_that_kvplug_does_not_know_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new kind of extra key in the engine means: not cached, until kvplug knows it."""
    from vllm.v1.core import kv_cache_utils

    known = kv_cache_utils.generate_block_hash_extra_keys

    def one_more(*arguments: Any) -> Any:
        extra, index = known(*arguments)
        return (*(extra or ()), ("novelty", "x")), index

    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", one_more)
    with pytest.raises(NamespaceError, match="does not know"):
        keys(request())


@pytest.mark.parametrize(
    ("uuids", "is_named"),
    [
        (None, False),
        ({}, False),
        ({"image": [None, None]}, False),
        ({"image": None, "audio": []}, False),
        ({"image": [None, FIRST]}, True),
        ({"video": "a"}, True),
        ({"audio": [None], "image": [""]}, True),
    ],
)
@pytest.mark.parametrize("way", ["renderer", "as given", "made anew", "by hand"])
@pytest.mark.parametrize("salt", [None, "tenant"])
def test_images_that_a_user_names_are_not_cached(uuids: Any, is_named: bool, way: str, salt: str | None) -> None:
    """Whatever their names look like: as vLLM's own hashes do, too."""

    def render(renderer: Any, prompt: Any, mm_data: Any, mm_uuids: Any) -> Any:
        return mm_input(prompt, MultiModalKwargsItems(), {"image": [FIRST]}, {})

    def process(processor: Any, request_id: str, prompt: Any, params: Any = None) -> Any:
        return request(**image(FIRST), cache_salt=salt)

    prompt: Any = {"prompt_token_ids": [1], "multi_modal_uuids": uuids}
    if way != "as given":
        prompt = compat_requests._around_media(render)(None, [1], {}, uuids)
    if way == "made anew":  # as beam search does
        prompt = mm_input([1, 2], prompt["mm_kwargs"], prompt["mm_hashes"], prompt["mm_placeholders"])
    if way == "by hand":  # hashes that a client sends
        prompt, is_named = render(None, [1], {}, None), True
    made = compat_requests._around_inputs(process)(PROCESSOR, "r", prompt, params=None)
    assert compat_requests.has_named_media(made) is is_named
    assert made.cache_salt == (f"kvplug-private|{salt or ''}" if is_named else salt)
    if not is_named:
        assert keys(made) == keys(request(**image(FIRST), cache_salt=salt))
        return
    with pytest.raises(NamespaceError, match="named by the user"):
        keys(made)
    assert keys(made, trust=True) != keys(request(**image(FIRST), cache_salt=salt))


def test_requests_of_text_are_as_they_were() -> None:
    made = compat_requests._around_inputs(lambda *_: request(cache_salt="a"))(PROCESSOR, "r", {"prompt_token_ids": [1]})
    assert made.cache_salt == "a"
    made = compat_requests._around_inputs(lambda *_: request())(PROCESSOR, "r", "a text")
    assert made.cache_salt is None


def test_images_that_the_engine_counts_are_not_cached() -> None:
    """Without caches of its own vLLM names an image by its number, hashed with what the request says of it."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_processor_cache_gb=4)),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
    )
    assert compat_requests.mm_named_by_content(config)
    config.model_config.multimodal_config.mm_processor_cache_gb = 0
    assert not compat_requests.mm_named_by_content(config)
    config.cache_config.enable_prefix_caching = True
    assert compat_requests.mm_named_by_content(config)
    with pytest.MonkeyPatch.context() as rust:
        rust.setenv("VLLM_USE_RUST_FRONTEND", "1")
        assert not compat_requests.mm_named_by_content(config)
    config.model_config.multimodal_config = None
    assert compat_requests.mm_named_by_content(config)
    for trust in (False, True):
        with pytest.raises(NamespaceError, match="counted"):
            keys(request(**image(FIRST)), trust=trust, mm_by_content=False)
    assert keys(request(), mm_by_content=False) == keys(request())
