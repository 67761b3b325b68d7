"""Tokens agree with an independent byte-pair encoder and with transformers; templates render as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.engine.gguf_file import GgufFile
from agentckpt.engine.load import LoadedModel, load_model, resolve
from agentckpt.engine.template import ChatTemplate
from agentckpt.engine.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, Tokenizer, bpe_spec, byte_alphabet
from agentckpt.errors import CorruptionError, IncompatibleError

transformers = pytest.importorskip("transformers")

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SNIPPETS = [
    "",
    " ",
    "\n\n\n",
    "a",
    "don't I'LL we're",
    "x = [1234567890, 3.14159, 0xFF, 1e-5]",
    "def f(a,\tb):\n\treturn {**a, 'b': b}\n",
    "    indented\n        more\n\n\n    end   ",
    "naïve café ÜBER ﬁ ½ Ⅷ ٤٥ 一二三 e\u0301",
    "日本語のテキスト 한국어 עברית हिन्दी ไทย",
    "😀😃👩\u200d👩\u200d👧\u200d👦🇩🇪",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|<|im_end|>|>",
    "\u200b\ufeff\u00a0\u2028\x00\x7f",
    "https://example.org/a?b=c&d=%20#e -- ***bold*** $x^2$",
    "\r\n\r mixed \r\n\n",
]


class PlainBpe:
    """Byte-level BPE as its papers describe it, in the plainest way: split, then merge the lowest-ranked pair until none is left."""

    def __init__(self, patterns: list[str], vocab: dict[str, int], merges: list[tuple[str, ...]], special: list[str]) -> None:
        self.patterns, self.vocab, self.special = patterns, vocab, special
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.char = {byte: char for char, byte in byte_alphabet().items()}

    def split(self, text: str, patterns: list[str]) -> Iterator[str]:
        """Each pattern cuts the pieces of the one before; what lies between two matches is a piece too."""
        if not patterns:
            yield text
            return
        at = 0
        for match in regex.finditer(patterns[0], text):
            for piece in (text[at : match.start()], match.group()):
                if piece:
                    yield from self.split(piece, patterns[1:])
            at = match.end()
        if text[at:]:
            yield from self.split(text[at:], patterns[1:])

    def merge(self, piece: str) -> list[int]:
        parts = [self.char[byte] for byte in piece.encode() if self.char[byte] in self.vocab]
        while len(parts) > 1:
            rank, at = min((self.ranks.get((a, b), 1 << 60), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == 1 << 60:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab[part] for part in parts]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        alternatives = "|".join(regex.escape(token) for token in sorted(self.special, key=len, reverse=True))
        for part in regex.split(f"({alternatives})", text):
            if part in self.special:
                ids.append(self.vocab[part])
            elif part:
                ids += [id for piece in self.split(part, self.patterns) for id in self.merge(piece)]
        return ids


@pytest.fixture(scope="module")
def plain(smollm2: LoadedModel) -> PlainBpe:
    metadata = GgufFile(resolve("smollm2-135m-instruct")).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    special = [text for text, type in zip(tokens, types) if type == 3]
    return PlainBpe([r"\p{N}", GPT2_PATTERN], {text: id for id, text in enumerate(tokens)}, merges, special)


@pytest.mark.model
def test_the_byte_alphabet_is_a_bijection() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == 32
    assert byte_alphabet()["Ċ"] == 10


@pytest.mark.model
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_smollm2_encodes_as_plain_bpe_does(snippet: str, smollm2: LoadedModel, plain: PlainBpe) -> None:
    assert smollm2.tokenizer.encode(snippet) == plain.encode(snippet)


@pytest.mark.model
def test_smollm2_encodes_whole_source_files(smollm2: LoadedModel, plain: PlainBpe, text: str) -> None:
    for body in (text, Path(__file__).read_text(), Path(json.__file__).read_text()):
        ids = smollm2.tokenizer.encode(body)
        assert ids == plain.encode(body)
        assert smollm2.tokenizer.decode(ids) == body


@pytest.mark.model
@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_encodes_as_plain_bpe_and_comes_back(smollm2: LoadedModel, plain: PlainBpe, body: str) -> None:
    ids = smollm2.tokenizer.encode(body)
    assert ids == plain.encode(body)
    kept = bytes(byte for byte in body.encode() if byte not in smollm2.tokenizer.missing_bytes)
    assert b"".join(map(smollm2.tokenizer.token_bytes, ids)) == kept
    assert smollm2.tokenizer.decode(ids) == kept.decode("utf-8", "replace")


@pytest.mark.model
def test_the_bytes_that_smollm2_lacks_are_known(smollm2: LoadedModel, tiny_models: dict[str, Path]) -> None:
    """Six control characters, the lead bytes of planes 4 to 11 (no assigned character), and bytes that UTF-8 never uses."""
    unused = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert smollm2.tokenizer.missing_bytes == unused | {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    assert smollm2.tokenizer.encode("a\x04b") == smollm2.tokenizer.encode("a") + smollm2.tokenizer.encode("b")
    assert smollm2.tokenizer.encode("/\x06/") == smollm2.tokenizer.encode("//")
    assert _pair(str(tiny_models["llama"]))[0].missing_bytes == frozenset()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_directories_tokenise_as_transformers_does(name: str, tiny_models: dict[str, Path], text: str) -> None:
    ours = load_model(tiny_models[name]).tokenizer
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tiny_models[name])
    for body in [*SNIPPETS, text, "<|start|>tool\n<tool_call>{}<|end|>"]:
        ids = reference.encode(body, add_special_tokens=False)
        assert ours.encode(body) == ids
        assert ours.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 480), max_size=12))
def test_any_ids_decode_as_transformers_does(tiny_models: dict[str, Path], ids: list[int]) -> None:
    """Random ids cut characters apart: the replacement characters must fall alike."""
    ours, reference = _pair(str(tiny_models["qwen2"]))
    assert ours.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


_PAIRS: dict[str, Any] = {}


def _pair(folder: str) -> Any:
    if folder not in _PAIRS:
        _PAIRS[folder] = load_model(folder).tokenizer, transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return _PAIRS[folder]


def test_the_patterns_split_as_their_models_do() -> None:
    """Llama 3 takes digits in threes, Qwen2 and SmolLM one by one; only SmolLM cuts digits from the space before them."""
    vocab = {char: id for id, char in enumerate(byte_alphabet())}
    digits = {"12": 256, "123": 257, "Ġ1": 258}
    merges = [("1", "2"), ("12", "3"), ("Ġ", "1")]
    found = {}
    for pre in ("smollm", "llama-bpe", "qwen2"):
        tokenizer = Tokenizer(bpe_spec(pre, vocab | digits, merges, [], origin="t"), eos_ids=(), bos_id=None)
        found[pre] = [tokenizer.token_bytes(id).decode() for id in tokenizer.encode("1234 12")]
        patterns = {"smollm": [r"\p{N}", GPT2_PATTERN], "llama-bpe": [LLAMA3_PATTERN], "qwen2": [QWEN2_PATTERN]}[pre]
        assert tokenizer.encode("1234 12") == PlainBpe(patterns, vocab | digits, merges, ["<none>"]).encode("1234 12")
    assert found["smollm"] == found["qwen2"] == ["1", "2", "3", "4", " ", "1", "2"]
    assert found["llama-bpe"] == ["123", "4", " ", "12"]


def test_llama_3_takes_whole_words_of_the_vocabulary_without_merging() -> None:
    vocab = {char: id for id, char in enumerate(byte_alphabet())} | {"xyz": 256}
    found = {}
    for pre in ("smollm", "llama-bpe", "qwen2"):
        tokenizer = Tokenizer(bpe_spec(pre, vocab, [], [], origin="t"), eos_ids=(), bos_id=None)
        found[pre] = [len(tokenizer.encode("xyz")), tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")]
    assert found == {"smollm": [3, False], "llama-bpe": [1, False], "qwen2": [3, True]}


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    good = bpe_spec("qwen2", {char: id for id, char in enumerate(byte_alphabet())}, [], [(256, "<x>", True)], origin="t")

    def load(**changes: Any) -> Tokenizer:
        return Tokenizer({**good, **changes}, eos_ids=(), bos_id=None)

    assert load().encode("<x>a") == [256, byte_id("a", good)]
    model = good["model"]
    for changes in (
        {"decoder": None},
        {"decoder": {"type": "Metaspace"}},
        {"model": {**model, "type": "Unigram"}},
        {"model": {**model, "dropout": 0.1}},
        {"model": {**model, "byte_fallback": True}},
    ):
        with pytest.raises(IncompatibleError):
            load(**changes)
    for changes in (
        {"model": None},
        {"model": {**model, "merges": [["a", "nowhere"]]}},
        {"added_tokens": [{**good["added_tokens"][0], "id": 999}]},
        {"model": {**model, "vocab": {**model["vocab"], "far": 1 << 40}}},
        {"pre_tokenizer": {"type": "Split"}},
        {"extra": float("nan")},
    ):
        with pytest.raises(CorruptionError):
            load(**changes)


def byte_id(char: str, spec: dict[str, Any]) -> int:
    return int(spec["model"]["vocab"][char])


def test_text_and_ids_that_do_not_exist(tiny_models: dict[str, Path]) -> None:
    tokenizer, _ = _pair(str(tiny_models["llama"]))
    with pytest.raises(IncompatibleError, match="UTF-8"):
        tokenizer.encode("broken \ud800 half")
    with pytest.raises(IncompatibleError):
        tokenizer.token_bytes(-1)
    assert tokenizer.token_bytes(511) == b""


MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "  What is 2 < 3 & 'x'? Ünïcode 😀  "},
    {"role": "assistant", "content": "  yes \n", "tool_calls": [{"name": "f", "arguments": {"a": [1, 2.5, None, True], "ü": "<>"}}]},
    {"role": "ipython", "content": "skipped"},
    {"role": "tool", "content": ""},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_transformers_renders_them(prompt: bool, count: int, tools: Any, tiny_models: dict[str, Path]) -> None:
    ours, reference = _pair(str(tiny_models["llama"]))
    expected = reference.apply_chat_template(MESSAGES[:count], tools=tools, add_generation_prompt=prompt, tokenize=False)
    assert ours.render(MESSAGES[:count], add_generation_prompt=prompt, tools=tools) == expected
    assert expected.startswith("<|begin|>")


@pytest.mark.model
@pytest.mark.parametrize("prompt", [False, True])
def test_smollm2s_own_template_renders_as_transformers_renders_it(prompt: bool, smollm2: LoadedModel, tiny_models: dict[str, Path]) -> None:
    _, reference = _pair(str(tiny_models["llama"]))
    for messages in (MESSAGES, MESSAGES[1:3], MESSAGES[:1]):
        expected = reference.apply_chat_template(
            messages, chat_template=smollm2.tokenizer.template, add_generation_prompt=prompt, tokenize=False
        )
        assert smollm2.tokenizer.render(messages, add_generation_prompt=prompt) == expected
    assert smollm2.tokenizer.has_template


def test_reasoning_time_and_variables_reach_the_template(tiny_models: dict[str, Path]) -> None:
    _, reference = _pair(str(tiny_models["llama"]))
    text = "{{ strftime_now('%Y') }}{{ mode }}{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}{% endfor %}{{ dict(a=1) }}"
    messages = [{"role": "assistant", "content": "", "reasoning": "because"}]
    expected = reference.apply_chat_template(messages, chat_template=text, tokenize=False, mode="m")
    template = ChatTemplate(text, {})
    assert template.render(messages, add_generation_prompt=False, variables={"mode": "m"}, now=datetime.now()) == expected
    past = template.render(messages, add_generation_prompt=False, variables={"mode": "m"}, now=datetime(1999, 1, 1))
    assert past == f"1999{expected[4:]}"


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ namespace(__x=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ range(10**9) | list }}",
        "{{ 1 // 0 }}",
        "{{ messages[9].content.x }}",
        "{{ messages | tojson(indent='x', separators=3) }}",
        "{% include 'other' %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_hostile_or_failing_template_gives_our_error(text: str) -> None:
    template = ChatTemplate(text, {})
    with pytest.raises(IncompatibleError, match="chat template"):
        template.render([{"role": "user", "content": "x"}], add_generation_prompt=False)


@pytest.mark.parametrize("name", ["dict.__init__", "strftime_now.__globals__", "messages.__class__", "namespace.__init__"])
def test_the_inside_of_python_is_not_there_for_a_template(name: str) -> None:
    template = ChatTemplate(f"<{{{{ {name} }}}}>", {})
    assert template.render([{"role": "user", "content": "x"}], add_generation_prompt=False) == "<>"


def test_messages_must_be_plain_values() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    for content in (b"bytes", object(), {1, 2}):
        with pytest.raises(IncompatibleError, match="chat message"):
            template.render([{"role": "user", "content": content}], add_generation_prompt=False)
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(IncompatibleError, match="levels"):
        template.render([{"role": "user", "content": deep}], add_generation_prompt=False)
    with pytest.raises(IncompatibleError):
        ChatTemplate("{% for %}", {})
    with pytest.raises(IncompatibleError):
        ChatTemplate("x" * (1 << 21), {})


def test_a_model_without_a_template_says_so() -> None:
    spec = bpe_spec("qwen2", {char: id for id, char in enumerate(byte_alphabet())}, [], [], origin="t")
    tokenizer = Tokenizer(spec, eos_ids=(), bos_id=None)
    assert not tokenizer.has_template
    with pytest.raises(IncompatibleError, match="no chat template"):
        tokenizer.render([], add_generation_prompt=True)
