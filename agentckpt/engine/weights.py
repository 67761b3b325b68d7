"""Where a model's tensors come from, and the check that they are the ones its config asks for.

Invariants:
1. ``check_tensors`` runs before the first tensor is read: every name and shape agrees with the config, so nothing is allocated
   that the file does not hold.
2. Tensor names are Hugging Face's, whatever the file calls them.
3. Only safetensors and GGUF are read. Pickle formats are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CorruptionError, IncompatibleError, NotFoundError
from .config import ModelConfig

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
MAX_JSON_BYTES = 256 << 20
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
"""buffers that old files carry and the config determines"""


class TensorSource(Protocol):
    """Tensors of one model under Hugging Face names. Shapes are known without reading."""

    origin: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in a float dtype."""
        ...


def layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names within one layer, and their shapes (``[out, in]`` for matrices)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (query,), "self_attn.k_proj.bias": (key,), "self_attn.v_proj.bias": (key,)}
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return shapes


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    inside = layer_tensors(config)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def check_tensors(source: TensorSource, config: ModelConfig) -> None:
    """Raises ``CorruptionError`` for a missing tensor or a wrong shape, ``IncompatibleError`` for one that would be ignored."""
    found, expected = source.shapes(), expected_tensors(config)
    for name, shape in expected.items():
        if name not in found:
            raise CorruptionError("a tensor is missing", object=source.origin, expected=f"{name} {list(shape)}", found="nothing")
        if tuple(found[name]) != shape:
            raise CorruptionError(object=f"{source.origin}: {name}", expected=f"shape {list(shape)}", found=f"shape {list(found[name])}")
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    extra = sorted(name for name in found if name not in expected and name not in tied and not name.endswith(IGNORED_SUFFIXES))
    if extra:
        raise IncompatibleError(
            f"{len(extra)} tensors that a {config.architecture} model does not have",
            code="unsupported-model",
            object=source.origin,
            expected="nothing beyond the config",
            found=", ".join(extra[:3]),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ``NotFoundError`` or ``CorruptionError``."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CorruptionError(object=str(path), expected=f"at most {MAX_JSON_BYTES} bytes", found=f"{size} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(object=str(path), expected="a file", found="nothing") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptionError("not JSON", object=str(path), expected="a JSON object", found=str(error)[:80]) from error
    if not isinstance(value, dict):
        raise CorruptionError(object=str(path), expected="a JSON object", found=type(value).__name__)
    return value


class SafetensorsSource:
    """One or several .safetensors files. The library checks header against file length; a cut file never opens."""

    def __init__(self, origin: str, files: Iterable[Path], *, index: Mapping[str, str] | None = None) -> None:
        self.origin = origin
        self.files = tuple(files)
        self._handles: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            handle = self._open(path)
            for name in handle.keys():  # noqa: SIM118 - not a dict
                self._add(name, handle, path, index)
        for name, file in (index or {}).items():
            if name not in self._shapes:
                raise CorruptionError("the index names a tensor that its file lacks", object=origin, expected=name, found=f"not in {file}")

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise NotFoundError("a weight file is missing", object=str(path), expected="a file", found="nothing") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptionError("not a whole safetensors file", object=str(path), found=str(error)[:120]) from error

    def _add(self, name: str, handle: Any, path: Path, index: Mapping[str, str] | None) -> None:
        if index is not None and index.get(name) != path.name:
            return
        if name in self._shapes:
            raise CorruptionError("a tensor stands in two files", object=self.origin, found=name)
        view = handle.get_slice(name)
        if view.get_dtype() not in FLOAT_TYPES:
            raise IncompatibleError(
                "quantised or integer weights", code="unsupported-model", object=f"{path.name}: {name}",
                expected=", ".join(FLOAT_TYPES), found=str(view.get_dtype()),
            )  # fmt: skip
        self._shapes[name] = tuple(view.get_shape())
        self._handles[name] = handle

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor


def open_safetensors(folder: Path) -> SafetensorsSource:
    """The weights of a Hugging Face directory. File names in the index must be plain names inside the folder.

    Raises ``NotFoundError``, ``CorruptionError``, and ``IncompatibleError`` where only pickle files are present.
    """
    single, listing = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if listing.exists():
        index = read_json(listing).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise CorruptionError(object=str(listing), expected="weight_map: tensor name to file name", found=type(index).__name__)
        files = sorted(set(index.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CorruptionError(object=str(listing), expected="a plain .safetensors file name", found=repr(file))
        return SafetensorsSource(str(folder), [folder / file for file in files], index=index)
    if single.exists():
        return SafetensorsSource(str(folder), [single])
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        raise IncompatibleError(
            "pickle weights are never opened", code="pickle-weights", object=str(folder), expected="model.safetensors",
            found="only .bin, .pt or .pth", hint="convert the weights to safetensors",
        )  # fmt: skip
    raise NotFoundError("no weights", object=str(folder), expected="model.safetensors or model.safetensors.index.json", found="neither")
