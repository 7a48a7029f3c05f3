"""Looks at the weights that a worker holds: what is sent to the workers for that."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from kvplug.adapters.common.weightbytes import digest_of, sample_of


class Look(NamedTuple):
    """What a worker holds now, and what has become of it so far."""

    changes: int
    """How many changes of weights its connector has seen."""
    losses: int
    """How often weights were thrown away, to be loaded anew."""
    sample: bytes
    whole: bytes
    """The digest of all; empty where the sample was none of those that were asked for."""


LookAtWeights: TypeAlias = "Callable[[tuple[bytes, ...] | None], list[Look] | None]"
"""What :func:`weights_look` says in each worker; None where one of them can't."""


def model_of(worker: Any) -> Any:
    """The worker's model, as vLLM's own calls find it."""
    return worker.get_model() if hasattr(worker, "get_model") else worker.worker.get_model()


sleeping: weakref.WeakSet[Any] = weakref.WeakSet()
"""Workers whose weights are out of the device's memory: reading them there would end the process."""


def _sleeps(worker: Any) -> bool:
    return worker in sleeping or getattr(worker, "worker", None) in sleeping


def weights_fingerprint(worker: Any) -> bytes:
    """In a worker: a sample, cheap enough to be taken before and after any call that may change weights. 16 bytes, or
    none where they can't be read.
    """
    return b"" if _sleeps(worker) else sample_of(model_of(worker), where=True)


def weights_look(worker: Any, samples: tuple[bytes, ...] | None) -> Look | None:
    """In a worker: what is in memory now; None if that can't be read.

    ``samples``: the digest is made only if the weights' sample is one of these; None: of any.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    if _sleeps(worker):
        return None
    try:
        connector: Any = get_kv_transfer_group()
        model = model_of(worker)
        sample = sample_of(model)
        whole = digest_of(model, _packed) if samples is None or sample in samples else b""
        return Look(int(connector.weight_changes_seen()), int(connector.weight_losses_seen()), sample, whole)
    except Exception:  # noqa: BLE001 - tensors of a kind that has no bytes, no memory beside the weights
        return None


def _packed(layer: Any) -> Any:
    """On CPUs: the call that has a linear layer's packed weights, made anew whenever they are."""
    return getattr(layer, "cpu_linear", None)


@dataclass(frozen=True)
class Seen:
    """What was in the workers' memory while it was known which weights these are."""

    looks: tuple[Look, ...]

    def again(self, look: LookAtWeights) -> bool | None:
        """Whether all is what it was, and was there all the time; None: that can't be read now.

        Other weights are told by their sample. Where weights were thrown away, also what layers have made of them in
        no tensor is lost, so that the same tensors are not enough.
        """
        found = look(tuple(one.sample for one in self.looks))
        if found is None:
            return None
        return [one[1:] for one in found] == [one[1:] for one in self.looks]


def see(look: LookAtWeights, changes: int) -> Seen | None:
    """What is there now; None if it can't be read, or was changed more often than ``changes`` says."""
    found = look(None)
    if not found or any(one.changes > changes for one in found):
        return None
    return Seen(tuple(found))
