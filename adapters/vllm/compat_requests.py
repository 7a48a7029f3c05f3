"""What vLLM's requests hold, and how images in them get their names: private interfaces, checked at the start.

vLLM names an image, audio or video by a hash of its content, or takes the name that a user gives it. In the engine
both may look alike. So kvplug looks where prompts are processed, and marks what was named by its content; a request
with anything else is told by its cache salt.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvplug.adapters.common.hooks import put_around
from kvplug.adapters.vllm import settings
from kvplug.adapters.vllm.environment import VARIABLES
from kvplug.errors import NamespaceError
from kvplug.identity.namespace import digest_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

MEDIA = "kvplug-media-"
"""How the salt begins of a request with media that were processed by other settings than vLLM's own. The process that
decodes them may be another host's than the engine, with settings that the engine's namespace does not know."""
_MEDIA_VARIABLES = re.compile(r"\w*(?:AUDIO|IMAGE|MEDIA|OPENCV|VIDEO)\w*")
PRIVATE = "kvplug-private|"
"""How the salt begins of a request with media that nobody vouches for. vLLM's own cache shares it as before."""


class ByContent(dict[str, Any]):
    """Names of media by modality, as vLLM has them, all of which are hashes of their content.

    It is handed on with the names by whoever makes one prompt of another; where it gets lost, nobody vouches for them.
    """


def processing() -> list[tuple[Any, str, tuple[str, ...]]]:
    """Where prompts are processed: owner, method, its first parameters."""
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    return [
        (BaseRenderer, "_process_multimodal", ("prompt", "mm_data", "mm_uuids")),
        (InputProcessor, "process_inputs", ("request_id", "prompt")),
    ]


def mark_named_media() -> None:
    """From now on requests with media that a user has named are marked. A second call changes nothing."""
    for (owner, name, _), around in zip(processing(), (_around_media, _around_inputs), strict=True):
        put_around(owner, name, around)


def _around_media(plain: Any) -> Any:
    @functools.wraps(plain)
    def process_multimodal(self: Any, prompt: Any, mm_data: Any, mm_uuids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = plain(self, prompt, mm_data, mm_uuids, *args, **kwargs)
        if not _names(mm_uuids):
            inputs["mm_hashes"] = ByContent(inputs["mm_hashes"])
        return inputs

    return process_multimodal


def _around_inputs(plain: Any) -> Any:
    @functools.wraps(plain)
    def process_inputs(self: Any, request_id: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = plain(self, request_id, prompt, *args, **kwargs)
        if request.mm_features:
            salt = request.cache_salt or ""
            mark = media_mark(self.vllm_config) if _is_vouched_for(prompt) and not salt.startswith(MEDIA) else PRIVATE
            request.cache_salt = mark + salt or None
        return request

    return process_inputs


def media_mark(config: Any) -> str:
    """What tells media that this process has decoded from those of one with other settings; empty for vLLM's own."""
    variables = {
        name: value for name, value in VARIABLES.deciding(os.environ).items() if _MEDIA_VARIABLES.fullmatch(name)
    }
    plain = {} if config.model_config.multimodal_config is None else settings.multimodal_defaults()
    chosen = {name: value for name, value in settings.multimodal(config).items() if plain.get(name) != value}
    if not variables and not chosen:
        return ""
    return f"{MEDIA}{digest_of([variables, chosen]).hex()}|"


def _is_vouched_for(prompt: Any) -> bool:
    if not isinstance(prompt, Mapping):
        return False
    if "mm_hashes" in prompt:  # as a renderer has made it, or whoever hands hashes in
        return isinstance(prompt["mm_hashes"], ByContent)
    return not _names(prompt.get("multi_modal_uuids"))  # as the user has given it: rendered in here


def _names(mm_uuids: Any) -> bool:
    """Whether anything in ``{"image": ["a name", None]}`` is a name."""
    some = mm_uuids.values() if isinstance(mm_uuids, Mapping) else ()
    return any(one is not None for names in some for one in ([names] if isinstance(names, str) else names or ()))


def has_named_media(request: Request) -> bool:
    """Whether nobody vouches that an image, audio or video of this request is named by its content."""
    return bool(request.mm_features) and (request.cache_salt or "").startswith(PRIVATE)


def extra_key_count(request: Request, end: int) -> int:
    """How many extra keys the engine itself sees in tokens 0..end; one more than expected is one that is not known."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    keys, _ = generate_block_hash_extra_keys(request, 0, end, 0)
    return len(keys or ())


def mm_named_by_content(config: Any) -> bool:
    """Whether it can be known what media are and what became of them. Without caches vLLM counts, and hashes nothing.

    Such a name does not show: with arguments for the processor in the request it is hashed along with these.
    """
    multimodal = getattr(config.model_config, "multimodal_config", None)
    if multimodal is None:
        return True
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):  # no plugin looks at what comes in there
        return False
    if getattr(config, "ec_transfer_config", None) is not None:  # another engine's weights and settings
        return False
    if config.cache_config.enable_prefix_caching:
        return True
    return bool(multimodal.mm_processor_cache_gb)


def embeds_digest(request: Request, start: int, end: int) -> bytes:
    """Digest of the prompt embeddings of tokens start..end."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
    last = keys[-1] if keys else b""
    digest = last[1] if isinstance(last, tuple) else last  # plain bytes up to 0.30, tagged since
    if not isinstance(digest, bytes):
        raise NamespaceError("the engine gives no digest for prompt embeddings")
    return digest
