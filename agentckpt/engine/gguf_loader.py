"""A model from one .gguf file: weights dequantised, q and k rows put back in order, tokenizer and template from the metadata.

Invariants:
1. What the conversion to GGUF changed is undone exactly: tensor names, and (architecture ``llama``) the order of rows within each
   head of q and k, which the conversion interleaves for another form of rotary embedding.
2. Dequantisation is the reference one of the ``gguf`` package, in float32, in groups of rows that bound its temporary memory.

Source of names and permutation: convert_hf_to_gguf.py and gguf-py's tensor_mapping.py in the llama.cpp repository.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import CorruptionError, IncompatibleError
from .config import Fields, ModelConfig, config_from_gguf
from .gguf_file import GgufFile, GgufTensor
from .tokenizer import Tokenizer, bpe_spec

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
GROUP_ROWS = 256
"""rows dequantised at once: 3.5 times faster than the package's own groups of 16, a few MB of temporaries"""
PROBE_ROWS = 4
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
"""control tokens that end a generation even where the metadata names another one as eos"""
PRE_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name stays as it is (and is refused by ``check_tensors``)."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    block, _, rest = name.partition(".")[2].partition(".")
    if name.startswith("blk.") and block.isdecimal() and rest in LAYER_NAMES:
        return f"model.layers.{int(block)}.{LAYER_NAMES[rest]}"
    return name


def dequantise(rows: Bytes, type: GGMLQuantizationType, *, origin: str) -> Floats:
    """uint8[n, row_bytes] -> float32[n, row]. Raises ``IncompatibleError`` for a type that the ``gguf`` package cannot expand."""
    if type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return np.asarray(quants.dequantize(np.ascontiguousarray(rows), type), dtype=np.float32)
    form = getattr(quants, type.name, None)
    if form is None:
        raise IncompatibleError(code="unsupported-model", object=origin, expected="a tensor type that gguf expands", found=type.name)
    form.init_grid()
    block, block_bytes = GGML_QUANT_SIZES[type]
    values = np.empty((len(rows), rows.shape[1] // block_bytes * block), dtype=np.float32)
    for start in range(0, len(rows), GROUP_ROWS):
        values[start : start + GROUP_ROWS] = form.dequantize_rows(rows[start : start + GROUP_ROWS])
    return values


class GgufSource:
    """The tensors of a GGUF file under Hugging Face names, float32."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.origin = file.origin
        self._tensors: dict[str, GgufTensor] = {}
        for tensor in file.tensors.values():
            name = hf_name(tensor.name)
            if tensor.name == ROPE_FACTORS:
                continue
            if name in self._tensors:
                found = f"{tensor.name}, {self._tensors[name].name}"
                raise CorruptionError("two tensors with one meaning", object=self.origin, found=found)
            self._tensors[name] = tensor
        self.interleaved_heads: dict[str, int] = {}
        """heads of the matrices whose rows the conversion reordered, by the end of their name"""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        values = dequantise(self.file.rows(tensor), tensor.type, origin=f"{self.origin}: {tensor.name}").reshape(tensor.shape)
        for suffix, num_heads in self.interleaved_heads.items():
            if name.endswith(suffix):
                values = _deinterleave(values, num_heads)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def recipe(self) -> dict[str, bytes]:
        """For each quantised type: SHA-256 of what the first rows of the first such tensor (by name) become."""
        probes: dict[str, bytes] = {}
        for tensor in sorted(self._tensors.values(), key=lambda tensor: tensor.name):
            if tensor.type.name not in probes:
                values = dequantise(self.file.rows(tensor)[:PROBE_ROWS], tensor.type, origin=self.origin)
                probes[tensor.type.name] = hashlib.sha256(values.astype("<f4").tobytes()).digest()
        return probes


def _deinterleave(values: Floats, num_heads: int) -> Floats:
    """Rows 0, 2, 4 ... of each head, then rows 1, 3, 5 ...: the inverse of the conversion's ``permute``."""
    rest = values.shape[1:]
    return np.ascontiguousarray(values.reshape(num_heads, -1, 2, *rest).swapaxes(1, 2)).reshape(values.shape)


def open_gguf(path: Path) -> tuple[ModelConfig, GgufSource, Tokenizer]:
    """Everything but the weights' bytes. Raises ``NotFoundError``, ``CorruptionError``, ``IncompatibleError``."""
    file = GgufFile(path)
    source = GgufSource(file)
    fields = Fields(file.metadata, file.origin)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CorruptionError("a tensor is missing", object=file.origin, expected="token_embd.weight", found="nothing")
    tokens = fields.strings("tokenizer.ggml.tokens")
    if len(tokens) > embedding.shape[0]:
        raise CorruptionError(object=f"{file.origin}: tokenizer", expected=f"at most {embedding.shape[0]} tokens", found=str(len(tokens)))
    config = config_from_gguf(
        file.metadata,
        origin=file.origin,
        vocab_size=embedding.shape[0],
        tie_embeddings="output.weight" not in file.tensors,
        rope_factors=_rope_factors(file),
        eos_ids=_eos_ids(fields, tokens),
        bos_id=next(iter(fields.ids("tokenizer.ggml.bos_token_id")), None),
    )
    if config.architecture == "llama":
        source.interleaved_heads = {"q_proj.weight": config.num_heads, "k_proj.weight": config.num_kv_heads}
    return config, source, _tokenizer(fields, tokens, config)


def _rope_factors(file: GgufFile) -> tuple[float, ...] | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        found = f"{tensor.type.name} {tensor.shape}"
        raise CorruptionError(object=f"{file.origin}: {ROPE_FACTORS}", expected="F32, one dimension", found=found)
    return tuple(float(value) for value in file.rows(tensor).view("<f4").ravel())


def _token_types(fields: Fields, num_tokens: int) -> list[int]:
    types = fields.values.get("tokenizer.ggml.token_type", [1] * num_tokens)
    if not isinstance(types, list) or len(types) != num_tokens or not all(isinstance(kind, int) for kind in types):
        where = f"{fields.origin}: tokenizer.ggml.token_type"
        raise CorruptionError(object=where, expected=f"{num_tokens} integers", found="something else")
    return types


def _eos_ids(fields: Fields, tokens: list[str]) -> list[int]:
    named = [id for which in ("eos", "eot", "eom") for id in fields.ids(f"tokenizer.ggml.{which}_token_id")]
    types = _token_types(fields, len(tokens))
    return named + [id for id, text in enumerate(tokens) if types[id] == CONTROL and text in END_TEXTS]


def _tokenizer(fields: Fields, tokens: list[str], config: ModelConfig) -> Tokenizer:
    origin = fields.origin
    kind = fields.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise IncompatibleError(
            "this kind of tokenizer", code="unsupported-model", object=origin, expected="gpt2 (byte-level BPE)", found=kind
        )
    types = _token_types(fields, len(tokens))
    vocab = {text: id for id, text in enumerate(tokens) if types[id] != UNUSED}
    if len(vocab) != sum(kind != UNUSED for kind in types):
        raise CorruptionError("a token stands twice", object=f"{origin}: tokenizer.ggml.tokens")
    merges = [line.split(" ") for line in fields.strings("tokenizer.ggml.merges")]
    if not all(len(pair) == 2 for pair in merges):
        raise CorruptionError(object=f"{origin}: tokenizer.ggml.merges", expected="two pieces and one space each", found="something else")
    pre = fields.text("tokenizer.ggml.pre", "none named")
    added = [(id, text, types[id] == CONTROL) for id, text in enumerate(tokens) if types[id] in (CONTROL, USER_DEFINED)]
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        for id in fields.ids(f"tokenizer.ggml.{key}_token_id"):
            if not 0 <= id < len(tokens):
                raise fields.bad(f"tokenizer.ggml.{key}_token_id", f"0 to {len(tokens) - 1}")
            special[f"{name}_token"] = tokens[id]
    return Tokenizer(
        bpe_spec(PRE_ALIASES.get(pre, pre), vocab, merges, added, origin=origin),
        eos_ids=config.eos_ids,
        bos_id=config.bos_id,
        special_tokens=special,
        template=fields.text("tokenizer.chat_template", "") or None,
        origin=origin,
    )
