"""SGLang's own tests of a running server, from the release that is installed, with a server for them to talk to.

SGLang ships these tests as mixins (``sglang.test.kits``); each class here is one of them and the few values that it
asks its user for. ``UPSTREAM_SERVER`` and ``UPSTREAM_MODEL`` say where the server is and what it serves. Left out, each
for the reason that it gives, is what asks a model for knowledge.
"""

import os
import random
import sys
import types
import unittest
from typing import Any

sys.modules.setdefault("datasets", types.ModuleType("datasets"))  # of the hub, which is not asked here
sys.modules["datasets"].__getattr__ = lambda name: None  # type: ignore[method-assign]

from sglang.test import kl_multiturn_utils, kl_test_utils  # noqa: E402
from sglang.test.kits import (  # noqa: E402
    abort_timeout_kit,
    basic_scheduler_stress_kit,
    cache_hit_kit,
    kl_divergence_kit,
    pause_generation_kit,
    radix_cache_server_kit,
    unified_radix_cache_kit,
)
from sglang.test.test_utils import CustomTestCase  # noqa: E402

SERVER, MODEL = os.environ["UPSTREAM_SERVER"], os.environ["UPSTREAM_MODEL"]
PROMPTS = 8
KNOWLEDGE = "asks the model about the world, which one with made-up weights knows nothing of"
drawn = random.Random(4)
ids = [[drawn.randint(3, 30000) for _ in range(drawn.randint(400, 1200))] for _ in range(48)]
kl_test_utils.get_input_ids = lambda *_args, **_kwargs: ids[:PROMPTS]  # instead of a data set from the hub
cache_hit_kit.sample_random_requests = lambda input_len, num_prompts, **_: [  # likewise
    types.SimpleNamespace(prompt=[drawn.randint(3, 30000) for _ in range(input_len)]) for _ in range(num_prompts)
]


class Server(CustomTestCase):
    """What the kits expect of the class that has started a server."""

    base_url = SERVER
    model = MODEL
    process = types.SimpleNamespace(poll=lambda: None)


class KLDivergence(kl_divergence_kit.KLDivergenceMixin, Server):
    """Log-probabilities that were computed on cached pages, and anew."""

    kl_div_thres = 1e-4
    kl_div_max_samples = PROMPTS
    kl_div_prefill_max_new_tokens = kl_div_decode_max_new_tokens = 96


class UnifiedRadixTree(unified_radix_cache_kit.UnifiedRadixTreeTestMixin, Server):
    """Several turns in several branches."""

    kl_threshold = 1e-4
    max_new_tokens = 48
    input_ids = ids
    test_gsm8k = unittest.skip(KNOWLEDGE)(lambda self: None)


class TwoPasses(unified_radix_cache_kit.AccuracyTwoPassMixin, Server):
    """What was served before SGLang's caches were emptied comes from the storage."""

    test_gsm8k_two_passes = unittest.skip(KNOWLEDGE)(lambda self: None)


class Pause(pause_generation_kit.PauseResumeInPlaceMixin, Server):
    """Requests that stand still for a moment."""

    pause_num_requests = 12
    pause_ignore_eos = True
    pause_duration = 2


class Abort(abort_timeout_kit.AbortAllMixin, Server):
    """All requests, in the middle."""

    abort_all_num_requests = 12
    abort_all_max_new_tokens = 3000


class Stress(basic_scheduler_stress_kit.BasicSchedulerStressMixin, Server):
    """A long prompt in chunks."""

    test_streaming_response = unittest.skip(KNOWLEDGE)(lambda self: None)
    test_concurrent_requests = unittest.skip(KNOWLEDGE)(lambda self: None)


class Functions(Server):
    """Tests that SGLang keeps as functions."""

    def test_multiturn_cache_hit(self) -> None:
        cache_hit_kit.run_multiturn_cache_hit_test(SERVER, MODEL, num_clients=4, request_length=192, output_length=32)

    @unittest.skip("400 requests of up to 256 tokens each, in one answer: minutes on a CPU")
    def test_radix_attention(self) -> None:
        radix_cache_server_kit.run_radix_attention_test(SERVER)

    def test_logprobs_match(self) -> None:
        thresholds: Any = {MODEL: {"kl_div": 1e-4}}
        kl_test_utils.test_input_output_logprobs_match_helper(SERVER, thresholds, MODEL, PROMPTS, 96)

    def test_prefill_cache_hits_exactly(self) -> None:
        prefixes = [one[:384] for one in ids[:4]]
        kl_multiturn_utils.test_input_output_logprobs_match_prefill_cache_hit_helper(
            SERVER,
            MODEL,
            1e-4,
            prefix_input_ids=prefixes,
            full_input_ids=[prefix + ids[9][:70] for prefix in prefixes],
            max_new_tokens=32,
            assert_prefill_cached_tokens=kl_multiturn_utils.default_prefill_cache_assert,
        )


del Server
