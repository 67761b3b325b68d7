"""``model_id`` changes with whatever changes the weights or the arithmetic, and with nothing else."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import pytest
from safetensors.torch import load_file, save_file

from agentckpt.engine import identity
from agentckpt.engine.gguf_loader import open_gguf
from agentckpt.engine.load import LoadedModel, load_model, resolve
from agentckpt.engine.model import Model
from agentckpt.errors import AgentckptError, ConflictError, CorruptionError, IncompatibleError, NotFoundError


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2"], target)
    return target


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_the_id_follows_weights_and_arithmetic_alone(folder: Path, tmp_path: Path) -> None:
    first = load_model(folder)
    assert len(first.model_id) == len(first.tokenizer_id) == len(first.template_id or b"") == 32
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_model(tmp_path / "elsewhere").model_id == first.model_id
    edit(folder / "config.json", eos_token_id=2, transformers_version="9", max_position_embeddings=100)
    changed_end = load_model(folder, dtype="bfloat16")
    assert changed_end.model_id == first.model_id
    assert changed_end.config.eos_ids != first.config.eos_ids
    edit(folder / "config.json", rms_norm_eps=1e-5)
    other_norm = load_model(folder)
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    other_rope = load_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, folder / "model.safetensors")
    other_weights = load_model(folder)
    assert len({loaded.model_id for loaded in (first, other_norm, other_rope, other_weights)}) == 4
    assert {loaded.tokenizer_id for loaded in (first, other_norm, other_rope, other_weights)} == {first.tokenizer_id}


def test_tokenizer_and_template_have_ids_of_their_own(folder: Path) -> None:
    first = load_model(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    second = load_model(folder)
    assert second.template_id != first.template_id
    assert (second.tokenizer_id, second.model_id) == (first.tokenizer_id, first.model_id)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(spec, indent=1))
    cut = load_model(folder)
    assert cut.tokenizer_id == first.tokenizer_id
    assert cut.tokenizer.encode("one two three four") == first.tokenizer.encode("one two three four")
    spec["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert load_model(folder).tokenizer_id != first.tokenizer_id
    (folder / "chat_template.jinja").unlink()
    bare = load_model(folder)
    assert bare.template_id is None
    assert not bare.tokenizer.has_template


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(3 << 20))
    cache: dict[identity.FileKey, bytes] = {}
    assert identity.file_digest(path, cache=cache) == blake3.blake3(path.read_bytes()).digest()
    assert len(cache) == 1
    key = next(iter(cache))
    cache[key] = b"x" * 32
    assert identity.file_digest(path, cache=cache) == b"x" * 32
    cache[key] = b"short"
    assert identity.file_digest(path, cache=cache) == blake3.blake3(path.read_bytes()).digest()
    path.write_bytes(b"other")
    assert identity.file_digest(path, cache=cache) == blake3.blake3(b"other").digest()
    assert len(cache) == 2
    with pytest.raises(NotFoundError):
        identity.file_digest(tmp_path / "none", cache=cache)
    keys = iter([("a", 1, 5, 1), ("a", 1, 5, 2)])
    monkeypatch.setattr(identity, "file_key", lambda _: next(keys))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"moved")
    with pytest.raises(ConflictError, match="changed"):
        identity.file_digest(path, cache={})


def test_weights_that_change_while_they_are_loaded_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = folder / "model.safetensors"
    from agentckpt.engine import load

    def meddle(*args: object, **options: object) -> object:
        os.utime(weights, ns=(1, 1))
        return Model(*args, **options)

    monkeypatch.setattr(load, "Model", meddle)
    with pytest.raises(ConflictError, match="changed while it was loaded"):
        load_model(folder)


def test_digests_separate_parts_and_purposes() -> None:
    assert identity.digest("x", [b"ab", b"c"]) != identity.digest("x", [b"a", b"bc"])
    assert identity.digest("x", [b"ab"]) != identity.digest("y", [b"ab"])
    assert identity.canonical_json({"b": 1.5, "a": ["ü"]}) == '{"a":["ü"],"b":1.5}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        identity.canonical_json(float("nan"))


def test_dequantisation_enters_by_its_effect(
    tiny_models: dict[str, Path], gguf_writer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_writer(tiny_models["qwen3"], tmp_path / "m.gguf", quantise="Q8_0")
    first = load_model(path)
    assert set(open_gguf(path)[1].recipe()) == {"F32", "Q8_0"}
    from gguf.quants import Q8_0

    plain = Q8_0.dequantize_blocks
    monkeypatch.setattr(Q8_0, "dequantize_blocks", classmethod(lambda cls, blocks: plain(blocks) * 2))
    assert load_model(path).model_id != first.model_id
    monkeypatch.undo()
    assert load_model(path).model_id == first.model_id


@pytest.mark.model
def test_smollm2_has_the_id_it_always_had(smollm2: LoadedModel) -> None:
    """A change here makes every stored KV of this model foreign."""
    assert smollm2.model_id.hex() == PINNED_MODEL_ID
    assert smollm2.tokenizer_id.hex() == PINNED_TOKENIZER_ID
    assert smollm2.name == "smollm2-135m-instruct"
    assert load_model(resolve("smollm2-135m-instruct")).model_id == smollm2.model_id


PINNED_MODEL_ID = "effa89b2945786d1bbe8a502a61d01a879b4edb0a35684ad3827879dd64bcdec"
PINNED_TOKENIZER_ID = "9d2f9b33f5bfaf602eb783b9d898abfb0659c4b076bb0c72b9b323b6a0750d4f"


BAD_CONFIGS: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, IncompatibleError, "GPT2LMHeadModel"),
    ({"architectures": ["MixtralForCausalLM"]}, IncompatibleError, "Mixtral"),
    ({"architectures": None}, IncompatibleError, "none named"),
    ({"hidden_act": "gelu"}, IncompatibleError, "gelu"),
    ({"attention_bias": True}, IncompatibleError, "attention_bias"),
    ({"quantization_config": {"quant_method": "awq"}}, IncompatibleError, "awq"),
    ({"num_experts": 8}, IncompatibleError, "num_experts"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, IncompatibleError, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, IncompatibleError, "dynamic"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, IncompatibleError, "sliding"),
    ({"layer_types": None, "use_sliding_window": True, "max_window_layers": 1}, IncompatibleError, "sliding"),
    ({"num_hidden_layers": 10**12}, CorruptionError, "num_layers"),
    ({"num_hidden_layers": 4}, CorruptionError, r"layers\.3"),
    ({"num_hidden_layers": 2}, IncompatibleError, r"layers\.2"),
    ({"num_attention_heads": 0}, CorruptionError, "num_attention_heads"),
    ({"hidden_size": "64"}, CorruptionError, "hidden_size"),
    ({"hidden_size": True}, CorruptionError, "hidden_size"),
    ({"intermediate_size": 95}, CorruptionError, r"\[95, 64\]"),
    ({"vocab_size": 100}, CorruptionError, "vocab|tokens|shape"),
    ({"eos_token_id": 512}, CorruptionError, "eos"),
    ({"rms_norm_eps": 0}, CorruptionError, "rms_norm_eps"),
    ({"rope_parameters": 3}, CorruptionError, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, CorruptionError, "low_freq_factor"),
    ({"tie_word_embeddings": False}, CorruptionError, "lm_head"),
]


@pytest.mark.parametrize(("changes", "error", "says"), BAD_CONFIGS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_config_the_engine_cannot_run_is_refused_by_name(
    changes: dict[str, object], error: type[Exception], says: str, folder: Path
) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(error, match=says):
        load_model(folder)


def test_every_declared_end_counts(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[7, 5])
    edit(folder / "config.json", eos_token_id=1)
    loaded = load_model(folder)
    assert loaded.config.eos_ids == (1, 5, 7)
    assert loaded.tokenizer.eos_ids == {1, 5, 7}
    assert loaded.tokenizer.bos_id == loaded.config.bos_id == 0
    edit(folder / "generation_config.json", eos_token_id=["x"])
    with pytest.raises(CorruptionError, match="eos_token_id"):
        load_model(folder)


def test_a_window_that_is_off_is_no_window(folder: Path) -> None:
    edit(folder / "config.json", layer_types=None, use_sliding_window=False, sliding_window=16, max_window_layers=1)
    load_model(folder)


def test_damaged_directories(folder: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(CorruptionError):
            load_model(folder)
    weights.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    with pytest.raises(CorruptionError):
        load_model(folder)
    weights.unlink()
    with pytest.raises(NotFoundError, match="no weights"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(IncompatibleError, match="pickle"):
        load_model(folder)
    weights.write_bytes(whole)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(IncompatibleError, match="sentencepiece"):
        load_model(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CorruptionError, match="JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_model(folder)


JUNK = [None, True, -1, 0, 10**400, 1.5, math.nan, math.inf, "", "x", "\ud800", [], [1], ["a"], {}, {"a": 1}, [[]], [{}], [None]]


def places(value: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield at
    steps = list(value)[:30] if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else []
    for step in steps:
        yield from places(value[step], (*at, step))  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_junk_anywhere_in_the_json_files_gives_an_error_of_ours(name: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(tiny_models[name], folder)
    rng = random.Random(name)
    refused = 0
    for path in sorted(folder.glob("*.json")):
        whole = path.read_text()
        found = [at for at in places(json.loads(whole)) if at]
        for at in rng.sample(found, min(len(found), 14)):
            for junk in rng.sample(JUNK, 2):
                value = inner = json.loads(whole)
                for step in at[:-1]:
                    inner = inner[step]
                inner[at[-1]] = junk
                path.write_text(json.dumps(value))
                try:
                    load_model(folder).tokenizer.encode("a b <|start|>")
                except AgentckptError:
                    refused += 1
        path.write_text(whole)
    assert refused > 20


def test_shards_must_be_the_ones_the_index_names(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_models["llama"], folder)
    listing = folder / "model.safetensors.index.json"
    index = json.loads(listing.read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert len(files) > 2
    for bad, error in (
        (index | {"model.norm.weight": "../model.safetensors"}, CorruptionError),
        (index | {"model.norm.weight": "weights.bin"}, CorruptionError),
        (index | {"model.norm.weight": "absent.safetensors"}, NotFoundError),
        (index | {"model.more.weight": files[0]}, CorruptionError),
        ({name: file for name, file in index.items() if name != "model.norm.weight"}, CorruptionError),
        (index | {"model.norm.weight": 3}, CorruptionError),
    ):
        edit(listing, weight_map=bad)
        with pytest.raises(error):
            load_model(folder)
    edit(listing, weight_map=index)
    load_model(folder)
    (folder / files[1]).write_bytes((folder / files[1]).read_bytes()[:-3])
    with pytest.raises(CorruptionError, match="safetensors"):
        load_model(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype=__import__("torch").int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(IncompatibleError, match="I8"):
        load_model(folder)


def test_added_tokens_named_only_in_the_settings_count(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    token = {"content": "<extra>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    first = load_model(folder).tokenizer
    settings["added_tokens_decoder"] = {str(first.num_tokens): token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    second = load_model(folder).tokenizer
    assert second.encode("<extra>") == [first.num_tokens]
    assert second.num_tokens == first.num_tokens + 1
    settings["added_tokens_decoder"] = {"x": token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CorruptionError, match="added_tokens_decoder"):
        load_model(folder)
