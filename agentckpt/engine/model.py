"""The transformer itself, read top to bottom: Llama, Qwen2 and Qwen3 are one function with three small differences.

A flat batch of T tokens of several sequences goes through; the model knows nothing of sequences. Attention over the past belongs to
the caller's ``attend``, which stores K and V and returns the mixed values.

Invariants:
1. Nothing here is stateful: ``forward`` is a function of (weights, ids, positions, what attend returns).
2. Every matrix product goes through ``Model.linear``, so a batch-invariant product can be put in its place.
3. Norms, rotary angles and logits are computed in float32 whatever the weights' dtype, as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .config import ModelConfig, RopeScaling
from .weights import TensorSource, check_tensors

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q[T, Hq, D], k[T, Hkv, D], v[T, Hkv, D]) -> [T, Hq, D]; q and k are rotated already; v may be a strided view"""
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x[n, in], weight[out, in], bias[out] or None) -> [n, out]"""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights. q, k and v are one matrix; so are gate and up."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Model:
    """Weights on a device, and the two calls that use them. Thread-safe: it has no mutable state."""

    def __init__(self, config: ModelConfig, source: TensorSource, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load all tensors. Raises ``CorruptionError`` or ``IncompatibleError`` before anything is allocated."""
        check_tensors(source, config)
        self.config = config
        self.device = device
        self.dtype = dtype
        self.linear: Linear = functional.linear
        load = _Loader(source, device, dtype)
        self.embedding = load.joined(["model.embed_tokens.weight"])
        self.layers = [_load_layer(load, config, f"model.layers.{index}.") for index in range(config.num_layers)]
        self.norm = load.joined(["model.norm.weight"])
        self.head = self.embedding if config.tie_embeddings else load.joined(["lm_head.weight"])
        self.inverse_frequencies = inverse_frequencies(config).to(device)

    @torch.inference_mode()
    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids[T] and positions[T] (int64, on ``device``) -> hidden[T, hidden_size], final norm applied.

        ``ids`` must lie in [0, vocab_size): on CUDA an id outside ends the process's device context.
        """
        config = self.config
        x = functional.embedding(ids, self.embedding)
        cos, sin = self._rotary(positions)
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(layer, rms_norm(x, layer.input_norm, config.rms_norm_eps))
            mixed = attend(index, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + self.linear(mixed.reshape(len(ids), -1), layer.output, None)
            gate, up = self.linear(rms_norm(x, layer.post_norm, config.rms_norm_eps), layer.gate_up, None).chunk(2, dim=-1)
            x = x + self.linear(functional.silu(gate) * up, layer.down, None)
        return rms_norm(x, self.norm, config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden[n, hidden_size] as ``forward`` returned it -> float32[n, vocab_size]."""
        return self.linear(hidden, self.head, None).float()

    def _project(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        joined = self.linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, config.head_dim)
        q, k, v = torch.split(joined, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)
        return q, k, v

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle, [T, 1, D / 2], in the compute dtype."""
        angles = positions[:, None, None].float() * self.inverse_frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean is taken in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves form: x[T, heads, D], cos and sin [T, 1, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position turns each pair of dimensions: float32[D / 2] (Su et al., arXiv 2104.09864, then ``rope_scaling``)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long waves are slowed by ``factor``, short ones kept, those between interpolated linearly in old_length / wavelength."""
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((scaling.original_max_positions / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


class _Loader:
    """Moves tensors to their device and dtype; joined matrices are filled in place, so that no second copy of the model exists."""

    def __init__(self, source: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.shapes = source.shapes()
        self.device = device
        self.dtype = dtype

    def joined(self, names: list[str]) -> Tensor:
        """The tensors one below the other."""
        rows = [self.shapes[name][0] for name in names]
        target = torch.empty((sum(rows), *self.shapes[names[0]][1:]), dtype=self.dtype, device=self.device)
        for name, part in zip(names, torch.split(target, rows)):
            part.copy_(self.source.get(name))
        return target


def _load_layer(load: _Loader, config: ModelConfig, prefix: str) -> Layer:
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    return Layer(
        input_norm=load.joined([f"{prefix}input_layernorm.weight"]),
        qkv=load.joined([f"{attention}{which}_proj.weight" for which in "qkv"]),
        qkv_bias=load.joined([f"{attention}{which}_proj.bias" for which in "qkv"]) if config.qkv_bias else None,
        q_norm=load.joined([f"{attention}q_norm.weight"]) if config.qk_norm else None,
        k_norm=load.joined([f"{attention}k_norm.weight"]) if config.qk_norm else None,
        output=load.joined([f"{attention}o_proj.weight"]),
        post_norm=load.joined([f"{prefix}post_attention_layernorm.weight"]),
        gate_up=load.joined([f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"]),
        down=load.joined([f"{mlp}down_proj.weight"]),
    )
