"""Causal convolution over the last few tokens, with its state in a pool, in plain torch; SGLang has it in Triton."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def install() -> None:
    """Puts these two where SGLang's layers call the kernels."""
    from sglang.srt.layers.attention.mamba import causal_conv1d

    causal_conv1d._causal_conv1d_fn_triton = convolve
    causal_conv1d._causal_conv1d_update_triton = step


def _activated(out: torch.Tensor, activation: str | bool | None) -> torch.Tensor:
    return F.silu(out) if activation in ("silu", "swish", True) else out


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """``x`` [dim, tokens]: sequences one after another, from ``query_start_loc`` on; ``weight`` [dim, width];
    ``conv_states`` [slots, dim, width - 1], written in place: each sequence's last inputs."""
    out = torch.empty_like(x)
    keep = weight.shape[1] - 1
    starts = query_start_loc.tolist()
    for i, slot in enumerate(cache_indices.tolist()):
        inputs = x[:, starts[i] : starts[i + 1]]
        before = conv_states[slot][:, -keep:]
        if has_initial_state is None or not bool(has_initial_state[i]):
            before = torch.zeros_like(before)
        whole = torch.cat([before.to(inputs.dtype), inputs], dim=1)
        result = F.conv1d(whole.unsqueeze(0), weight.unsqueeze(1), bias, groups=weight.shape[0])[0]
        out[:, starts[i] : starts[i + 1]] = _activated(result, activation)
        conv_states[slot][:, -keep:] = whole[:, -keep:]
    return out


def step(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    *_: Any,
    conv_state_indices: torch.Tensor,
    **__: Any,
) -> torch.Tensor:
    """One token of each sequence: ``x`` [batch, dim]."""
    keep = weight.shape[1] - 1
    slots = conv_state_indices.long()
    window = torch.cat([conv_state[slots][:, :, -keep:].to(x.dtype), x.unsqueeze(-1)], dim=2)
    out = (window * weight).sum(-1)
    if bias is not None:
        out = out + bias
    states = conv_state[slots]
    states[:, :, -keep:] = window[:, :, 1:]
    conv_state[slots] = states
    return _activated(out, activation)
