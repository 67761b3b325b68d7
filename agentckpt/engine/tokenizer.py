"""Text to ids and back, for byte-level BPE (GPT-2's alphabet: every token is a byte string).

Invariants:
1. ``decode(ids)`` is the UTF-8 reading of the joined ``token_bytes``: bytes never depend on neighbouring tokens.
2. ``encode`` adds nothing: no beginning-of-text, no prefix space. The text of a special token becomes that token. It loses nothing
   either, unless the vocabulary lacks a byte (``missing_bytes``): such bytes are left out, as the tokenizers library does.
3. The specification is plain JSON (tokenizer.json's own form, whether it was read from that file or made from GGUF metadata), and is
   checked to be byte-level BPE without dropout before it is used. ``spec_bytes`` is its canonical form, which ``tokenizer_id`` covers.

Sources: tokenizer.json of the tokenizers library; the byte alphabet of GPT-2's encoder; pre-tokeniser patterns as the models' own
tokenizer.json files give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import tokenizers

from ..errors import CorruptionError, IncompatibleError
from .identity import canonical_json
from .template import ChatTemplate

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 is itself, the rest are numbered from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split_then_bytes(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


DIGITS_THEN_BYTES = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {"pre_tokenizer": DIGITS_THEN_BYTES, "normalizer": None, "ignore_merges": False},
    "llama-bpe": {"pre_tokenizer": _split_then_bytes(LLAMA3_PATTERN), "normalizer": None, "ignore_merges": True},
    "qwen2": {"pre_tokenizer": _split_then_bytes(QWEN2_PATTERN), "normalizer": {"type": "NFC"}, "ignore_merges": False},
}
"""what GGUF's ``tokenizer.ggml.pre`` stands for"""


def bpe_spec(
    pre: str, vocab: Mapping[str, int], merges: Sequence[Sequence[str]], added: Iterable[tuple[int, str, bool]], *, origin: str
) -> dict[str, Any]:
    """tokenizer.json for a byte-level BPE with the pre-tokeniser that GGUF calls ``pre``. ``added``: (id, text, special).

    Raises ``IncompatibleError`` for a pre-tokeniser that is not known: a wrong one gives wrong tokens silently.
    """
    rules = PRE_TOKENIZERS.get(pre)
    if rules is None:
        raise IncompatibleError(
            "unknown pre-tokeniser", code="unsupported-model", object=origin, expected=", ".join(PRE_TOKENIZERS), found=pre
        )
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
            for id, text, special in added
        ],
        "normalizer": rules["normalizer"],
        "pre_tokenizer": rules["pre_tokenizer"],
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "ignore_merges": rules["ignore_merges"],
            "vocab": dict(vocab),
            "merges": [list(pair) for pair in merges],
        },
    }


def check_spec(spec: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """The specification less what ``encode`` never uses. Raises ``IncompatibleError`` unless it is plain byte-level BPE."""
    model, decoder = spec.get("model"), spec.get("decoder")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not isinstance(spec.get("added_tokens", []), list):
        raise CorruptionError(object=origin, expected="a tokenizer specification with a model", found="none")
    inner = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else [decoder]
    kinds = [step.get("type") if isinstance(step, dict) else None for step in inner]
    if model.get("type", "BPE") != "BPE" or kinds != ["ByteLevel"]:
        raise IncompatibleError(
            "this kind of tokenizer", code="unsupported-model", object=origin, expected="BPE, decoder ByteLevel",
            found=f"{model.get('type')}, decoder {kinds}",
        )  # fmt: skip
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise IncompatibleError(
                "this kind of tokenizer", code="unsupported-model", object=origin, expected=f"no {key}", found=str(model[key])
            )
    return {**spec, "truncation": None, "padding": None, "post_processor": None}


class Tokenizer:
    """One model's tokenizer and chat template. Thread-safe."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        *,
        eos_ids: Sequence[int],
        bos_id: int | None,
        special_tokens: Mapping[str, str] | None = None,
        template: str | None = None,
        origin: str = "tokenizer",
    ) -> None:
        """``spec``: the object of a tokenizer.json. Raises ``IncompatibleError`` or ``CorruptionError``."""
        self.origin = origin
        checked = check_spec(spec, origin=origin)
        self.eos_ids = frozenset(eos_ids)
        self.bos_id = bos_id
        self.template = template
        self._chat = None if template is None else ChatTemplate(template, special_tokens or {}, origin=f"{origin}: chat template")
        try:
            self.spec_bytes = canonical_json(checked)
            self._tokenizer = tokenizers.Tokenizer.from_str(self.spec_bytes.decode())
        except Exception as error:  # the library raises bare Exception for a bad specification
            raise CorruptionError(object=origin, expected="a valid tokenizer specification", found=str(error)[:120]) from error
        self._bytes = self._token_table(checked.get("added_tokens") or [])

    def _token_table(self, listed: list[dict[str, Any]]) -> list[bytes]:
        alphabet = byte_alphabet()
        table: dict[int, bytes] = {}
        for piece, id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            try:
                table[id] = bytes(map(alphabet.__getitem__, piece))
            except KeyError:  # a special token's text
                table[id] = piece.encode()
        self.missing_bytes = frozenset(range(256)) - {piece[0] for piece in table.values() if len(piece) == 1}
        added = self._tokenizer.get_added_tokens_decoder()
        table |= {id: token.content.encode() for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        for entry in listed:
            if entry["id"] not in added or added[entry["id"]].content != entry["content"]:
                raise CorruptionError("an added token has another id", object=self.origin, found=f"{entry['id']} {entry['content']!r}")
        size = max(table, default=-1) + 1
        if size > 2 * len(table) + 4096:
            raise CorruptionError(object=self.origin, expected=f"ids below about {len(table)}", found=str(size - 1))
        return [table.get(id, b"") for id in range(size)]

    @property
    def num_tokens(self) -> int:
        """One more than the highest id."""
        return len(self._bytes)

    @property
    def has_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; nothing is added, special tokens in the text are recognised.

        Raises ``IncompatibleError`` for text that has no UTF-8 form (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise IncompatibleError(
                "text without a UTF-8 form", code="bad-text", object="encode", expected="valid Unicode", found=str(error),
                hint="decode bytes with errors='replace'",
            ) from error  # fmt: skip
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; empty for an id that the model has and the tokenizer does not. Raises ``IncompatibleError`` below 0."""
        if id < 0:
            raise IncompatibleError(code="bad-token", object="token id", expected="0 or more", found=str(id))
        return self._bytes[id] if id < len(self._bytes) else b""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        kept = (id for id in ids if not (skip_special and id in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The messages through the chat template (``template.ChatTemplate.render``). Raises ``IncompatibleError`` without a template."""
        if self._chat is None:
            raise IncompatibleError(
                "the model has no chat template", code="no-template", object=self.origin, hint="append text instead of messages"
            )
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables, now=now)
