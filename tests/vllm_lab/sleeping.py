"""Sleep as GPU workers have it, for the CPU worker, which ignores it: weights go away, and come back as the level says.

At level 1 they are kept in other memory. At level 2 they are lost, but for buffers, until somebody loads them again;
so are they at both while the worker sleeps. What is lost is random bytes here. And, as on GPUs, weights are in tensors:
vLLM packs them on CPUs where nobody else can write to them.
"""

from __future__ import annotations

from typing import Any

from kvplug.adapters.vllm import fingerprint

asleep = False
looks_asleep = 0
"""How often kvplug has read weights that were away."""


def install() -> None:
    """In a worker's process, before kvplug puts itself around these calls."""
    import torch
    from vllm.model_executor.layers import utils
    from vllm.v1.worker.cpu_worker import CPUWorker

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep

    def tensors(worker: Any, parameters: bool = True) -> dict[str, Any]:
        model = worker.get_model()
        found = dict(model.named_buffers())
        return dict(model.named_parameters()) | found if parameters else found

    plain = fingerprint.sample_of

    def sample_of(*args: Any, **kwargs: Any) -> bytes:
        global looks_asleep
        looks_asleep += asleep
        return plain(*args, **kwargs)

    fingerprint.sample_of = sample_of

    def sleep(self: Any, level: int = 1) -> None:
        global asleep
        asleep = True
        self.lab_kept = {name: tensor.detach().clone() for name, tensor in tensors(self, parameters=level == 1).items()}
        for tensor in tensors(self).values():
            tensor.detach().reshape(-1).view(torch.uint8).random_()

    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        global asleep
        if tags is None or "weights" in tags:
            asleep = False
            for name, tensor in self.lab_kept.items():
                tensors(self)[name].detach().copy_(tensor)

    CPUWorker.sleep, CPUWorker.wake_up = sleep, wake_up
