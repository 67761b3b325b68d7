"""A model from a Hugging Face directory: config.json, safetensors, tokenizer.json, chat template.

Only data files are read: no code from the directory runs, and pickle weights are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CorruptionError, IncompatibleError
from .config import Fields, ModelConfig, config_from_hf
from .template import MAX_TEMPLATE_CHARS
from .tokenizer import Tokenizer
from .weights import SafetensorsSource, open_safetensors, read_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def open_hf(folder: Path) -> tuple[ModelConfig, SafetensorsSource, Tokenizer]:
    """Everything but the weights' bytes. Raises ``NotFoundError``, ``CorruptionError``, ``IncompatibleError``."""
    generation = folder / "generation_config.json"
    eos_ids = Fields(read_json(generation), str(generation)).ids("eos_token_id") if generation.exists() else ()
    config = config_from_hf(read_json(folder / "config.json"), origin=str(folder / "config.json"), eos_ids=eos_ids)
    source = open_safetensors(folder)
    return config, source, _tokenizer(folder, config)


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.model").exists():
        raise IncompatibleError(
            "a sentencepiece tokenizer", code="unsupported-model", object=str(folder), expected="tokenizer.json", found="tokenizer.model"
        )
    spec = read_json(path)
    settings = _optional_json(folder / "tokenizer_config.json")
    special = _special_tokens(_optional_json(folder / "special_tokens_map.json")) | _special_tokens(settings)
    tokenizer = Tokenizer(
        _with_added(spec, settings, str(path)),
        eos_ids=config.eos_ids,
        bos_id=config.bos_id,
        special_tokens=special,
        template=_template(folder, settings),
        origin=str(path),
    )
    if tokenizer.num_tokens > config.vocab_size:
        raise CorruptionError(object=str(path), expected=f"at most {config.vocab_size} tokens", found=str(tokenizer.num_tokens))
    return tokenizer


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names to texts; a token is given as text or as an object with ``content``."""
    found = {}
    for name in SPECIAL_TOKENS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _with_added(spec: Mapping[str, Any], settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """tokenizer_config.json may name added tokens that tokenizer.json lacks."""
    listed = spec.get("added_tokens") or []
    extra = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, list) or not isinstance(extra, dict):
        raise CorruptionError(object=origin, expected="added_tokens as a list, added_tokens_decoder as an object", found="something else")
    entries = {entry["id"]: entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), int)}
    for key, value in extra.items():
        if not key.isdecimal() or not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise CorruptionError(object=f"{origin}: added_tokens_decoder", expected="id to token", found=repr(key)[:40])
        entries.setdefault(int(key), {"id": int(key), **{name: value.get(name, False) for name in ADDED_TOKEN_FIELDS}})
    if len(entries) < len(listed):
        raise CorruptionError(object=f"{origin}: added_tokens", expected="one entry an id", found="something else")
    return {**spec, "added_tokens": [entries[id] for id in sorted(entries)]}


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else ``chat_template`` of tokenizer_config.json: text, or a list with one named ``default``."""
    path = folder / "chat_template.jinja"
    if path.exists():
        if path.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            found = f"{path.stat().st_size} bytes"
            raise CorruptionError(object=str(path), expected=f"at most {MAX_TEMPLATE_CHARS} characters", found=found)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorruptionError(object=str(path), expected="UTF-8", found=str(error)[:80]) from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        value = next((item.get("template") for item in value if isinstance(item, dict) and item.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise CorruptionError(object=f"{folder}: chat_template", expected="text", found=type(value).__name__)
    return value
