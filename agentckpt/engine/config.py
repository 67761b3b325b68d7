"""What a model is: the numbers that decide its shapes and its arithmetic, read from config.json or from GGUF metadata.

Invariants:
1. A ``ModelConfig`` that exists describes a model which the engine runs as its authors meant; anything else was refused by name.
2. Every number was range-checked here, so code behind it may multiply and allocate.

Sources: the key names of Hugging Face's config.json for Llama, Qwen2 and Qwen3; the GGUF specification (``{arch}.*`` keys).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import CorruptionError, IncompatibleError

Architecture = Literal["llama", "qwen2", "qwen3"]
HF_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
GGUF_ARCHITECTURES: dict[str, Architecture] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_positions")
MAX_LAYERS = 1024
MAX_DIMENSION = 1 << 24
"""No real model is near these; they stop a damaged file from asking for absurd amounts of memory."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies differ from ``theta ** (-2 i / head_dim)``.

    ``llama3``: the smooth interpolation of Llama 3.1 (``factor``, ``low_freq_factor``, ``high_freq_factor``, ``original_max_positions``).
    ``factors``: each frequency divided by its own factor (``factors``, head_dim / 2 of them), the form that GGUF files carry.
    """

    kind: Literal["llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    architecture: Architecture
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """rows of the embedding; the tokenizer may know fewer"""
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    eos_ids: tuple[int, ...]
    """sorted; generation ends at any of them"""
    bos_id: int | None

    def __post_init__(self) -> None:
        for field in SIZES:
            limit = MAX_LAYERS if field == "num_layers" else MAX_DIMENSION
            value = getattr(self, field)
            if not 0 < value <= limit:
                raise CorruptionError(object=f"model config: {field}", expected=f"1 to {limit}", found=str(value))
        if self.num_heads % self.num_kv_heads:
            raise CorruptionError(
                object="model config: num_kv_heads", expected=f"a divisor of {self.num_heads} heads", found=str(self.num_kv_heads)
            )
        if self.head_dim % 2:
            raise CorruptionError(object="model config: head_dim", expected="an even number", found=str(self.head_dim))
        for field in ("rope_theta", "rms_norm_eps"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise CorruptionError(object=f"model config: {field}", expected="a positive number", found=str(getattr(self, field)))
        for token in (*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])):
            if not 0 <= token < self.vocab_size:
                raise CorruptionError(object="model config: eos/bos id", expected=f"0 to {self.vocab_size - 1}", found=str(token))

    def arithmetic(self) -> dict[str, Any]:
        """The fields that decide KV and logits (JSON values): what ``model_id`` covers beside the weights."""
        fields = asdict(self)
        for name in ("eos_ids", "bos_id", "max_positions"):
            del fields[name]
        return fields


class Fields:
    """Typed access to untrusted key-value data; the errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values = values
        self.origin = origin

    def bad(self, key: str, expected: str) -> CorruptionError:
        found = repr(self.values[key])[:60] if key in self.values else "nothing"
        return CorruptionError(object=f"{self.origin}: {key}", expected=expected, found=found)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 63:
            raise self.bad(key, "a 64-bit integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1 << 63:
            raise self.bad(key, "a finite number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.bad(key, "text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.bad(key, "a list of strings")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.values.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.bad(key, "an id or a list of ids")
        return tuple(items)


def refuse(origin: str, what: str, found: str, *, expected: str) -> IncompatibleError:
    """The error for a sound model that the engine cannot run."""
    return IncompatibleError(f"the engine cannot run {what}", code="unsupported-model", object=origin, expected=expected, found=found)


def config_from_hf(raw: Mapping[str, Any], *, origin: str, eos_ids: Sequence[int] = ()) -> ModelConfig:
    """Read config.json. ``eos_ids`` are further ids (generation_config.json) at which generation ends.

    Raises ``IncompatibleError`` for what the engine does not run, ``CorruptionError`` for values that make no sense.
    """
    fields = Fields(raw, origin)
    names = fields.strings("architectures") if raw.get("architectures") is not None else []
    architecture = HF_ARCHITECTURES.get(names[0]) if len(names) == 1 else None
    if architecture is None:
        raise refuse(origin, "this architecture", ", ".join(names) or "none named", expected=", ".join(HF_ARCHITECTURES))
    num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    _refuse_hf_features(fields, architecture, num_layers)
    theta, scaling = _hf_rope(fields)
    if num_heads <= 0:
        raise fields.bad("num_attention_heads", "a positive number")
    eos = set(eos_ids) | set(fields.ids("eos_token_id"))
    bos = fields.ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", 128 if architecture == "qwen3" else hidden_size // num_heads),
        vocab_size=fields.integer("vocab_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_positions=fields.integer("max_position_embeddings", 2048),
        eos_ids=tuple(sorted(eos)),
        bos_id=bos[0] if bos else None,
    )


def _refuse_hf_features(fields: Fields, architecture: Architecture, num_layers: int) -> None:
    raw, origin = fields.values, fields.origin
    if fields.text("hidden_act", "silu") != "silu":
        raise refuse(origin, "this activation", fields.text("hidden_act"), expected="hidden_act silu")
    for key in ("attention_bias", "mlp_bias"):
        if fields.flag(key, False):
            raise refuse(origin, "these biases", f"{key} true", expected=f"{key} false")
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method") if isinstance(raw["quantization_config"], dict) else None
        raise refuse(origin, "quantised safetensors", str(method), expected="float weights, or a GGUF file")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            raise refuse(origin, "a mixture of experts", f"{key} {raw[key]}", expected="a dense model")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(origin, "partial rotary positions", str(raw["partial_rotary_factor"]), expected="partial_rotary_factor 1")
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", num_layers)
        sliding = architecture != "llama" and fields.flag("use_sliding_window", False) and first < num_layers
        layer_types = ["sliding_attention"] if sliding else []
    if not isinstance(layer_types, list):
        raise fields.bad("layer_types", "a list of strings")
    for kind in layer_types:
        if kind != "full_attention":
            raise refuse(origin, "this kind of attention layer (sliding window)", str(kind), expected="full_attention in every layer")


def _hf_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Both spellings: ``rope_parameters`` (one dict) and the older ``rope_theta`` beside ``rope_scaling``."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.values.get(key, {}), dict | None):
            raise fields.bad(key, "an object")
    values = dict(fields.values.get("rope_scaling") or {}) | dict(fields.values.get("rope_parameters") or {})
    rope = Fields(values, f"{fields.origin}: rope")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(fields.origin, "partial rotary positions", str(values["partial_rotary_factor"]), expected="partial_rotary_factor 1")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise refuse(fields.origin, "this rope scaling", kind, expected="default or llama3")
    scaling = RopeScaling(
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
    )
    if not (scaling.factor >= 1 and 0 < scaling.low_freq_factor < scaling.high_freq_factor and scaling.original_max_positions > 0):
        raise rope.bad("factor", "factor >= 1, 0 < low_freq_factor < high_freq_factor, original_max_position_embeddings > 0")
    return theta, scaling


def config_from_gguf(
    metadata: Mapping[str, Any],
    *,
    origin: str,
    vocab_size: int,
    tie_embeddings: bool,
    rope_factors: tuple[float, ...] | None,
    eos_ids: Sequence[int],
    bos_id: int | None,
) -> ModelConfig:
    """Read GGUF metadata; the arguments are what only the tensors and the tokenizer know. Raises as ``config_from_hf``."""
    fields = Fields(metadata, origin)
    name = fields.text("general.architecture")
    architecture = GGUF_ARCHITECTURES.get(name)
    if architecture is None:
        raise refuse(origin, "this architecture", name, expected=", ".join(GGUF_ARCHITECTURES))
    if fields.integer(f"{name}.expert_count", 0):
        raise refuse(origin, "a mixture of experts", f"{name}.expert_count {metadata[f'{name}.expert_count']}", expected="a dense model")
    if fields.integer(f"{name}.attention.sliding_window", 0):
        found = str(metadata[f"{name}.attention.sliding_window"])
        raise refuse(origin, "a sliding window", found, expected="full attention in every layer")
    scaling = fields.text(f"{name}.rope.scaling.type", "none")
    if scaling != "none" or fields.number(f"{name}.rope.scale_linear", 1.0) != 1.0:
        raise refuse(origin, "this rope scaling", scaling, expected="none, or a rope_freqs.weight tensor")
    num_heads, hidden_size = fields.integer(f"{name}.attention.head_count"), fields.integer(f"{name}.embedding_length")
    if num_heads <= 0:
        raise fields.bad(f"{name}.attention.head_count", "a positive number")
    head_dim = fields.integer(f"{name}.attention.key_length", hidden_size // num_heads)
    for key in (f"{name}.rope.dimension_count", f"{name}.attention.value_length"):
        if fields.integer(key, head_dim) != head_dim:
            raise refuse(origin, f"{key} other than the head's size", str(metadata[key]), expected=str(head_dim))
    if rope_factors is not None and (len(rope_factors) != head_dim // 2 or not all(math.isfinite(f) and f > 0 for f in rope_factors)):
        expected = f"{head_dim // 2} positive numbers"
        raise CorruptionError(object=f"{origin}: rope_freqs.weight", expected=expected, found=str(len(rope_factors)))
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.integer(f"{name}.block_count"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer(f"{name}.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=fields.integer(f"{name}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        rope_theta=fields.number(f"{name}.rope.freq_base", 10000.0),
        rope_scaling=None if rope_factors is None else RopeScaling("factors", factors=rope_factors),
        rms_norm_eps=fields.number(f"{name}.attention.layer_norm_rms_epsilon"),
        tie_embeddings=tie_embeddings,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_positions=fields.integer(f"{name}.context_length"),
        eos_ids=tuple(sorted(set(eos_ids))),
        bos_id=bos_id,
    )
