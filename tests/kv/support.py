"""A store in a dict that verifies what it gives, and a random model small enough for thousands of steps."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch
from blake3 import blake3

from agentckpt.engine.config import ModelConfig
from agentckpt.engine.identity import tokenizer_id
from agentckpt.engine.load import LoadedModel
from agentckpt.engine.model import Model
from agentckpt.engine.tokenizer import Tokenizer, bpe_spec, byte_alphabet
from agentckpt.engine.weights import expected_tensors
from agentckpt.errors import CorruptionError, NotFoundError
from agentckpt.nodes import get_node
from agentckpt.nodes.lists import MerkleList
from agentckpt.types import KIND_BYTE, Buffer, Kind, Ref

torch.set_num_threads(1)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class DictStore:
    """Sink and Source over a dict. ``broken`` references raise ``CorruptionError``; removed ones are absent."""

    def __init__(self) -> None:
        self.objects: dict[Ref, bytes] = {}
        self.broken: set[Ref] = set()
        self.num_puts = 0
        self.put_bytes = 0
        self.gate: threading.Event | None = None
        """puts of chunks wait for it"""

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        if self.gate is not None and kind == "chunk":
            assert self.gate.wait(30)
        content = bytes(data)
        ref = Ref(bytes([KIND_BYTE[kind]]) + blake3(content, derive_key_context=kind).digest())
        self.num_puts += 1
        self.put_bytes += len(content) * (ref not in self.objects)
        self.objects[ref] = content
        return ref

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        if ref in self.broken:
            raise CorruptionError(object=ref.hex(), expected="its hash", found="another")
        if ref not in self.objects:
            raise NotFoundError(object=ref.hex())
        if len(self.objects[ref]) > max_bytes:
            raise CorruptionError(object=ref.hex(), expected=f"at most {max_bytes} bytes", found=f"{len(self.objects[ref])}")
        return self.objects[ref]

    def read_into(self, ref: Ref, target: memoryview) -> None:
        data = self.get(ref, len(target))
        if len(data) != len(target):
            raise CorruptionError(object=ref.hex(), expected=f"{len(target)} bytes", found=f"{len(data)}")
        target[:] = data

    def has(self, ref: Ref) -> bool:
        return ref in self.objects

    def chunks(self, ref: Ref) -> list[tuple[Ref, ...]]:
        """The chunk references of a ``kv`` node: one tuple a whole block, then the tail block's if there is one."""
        node = get_node(self, ref, type="kv")
        items = MerkleList.open(node.body["blocks"], node.strong, node.weak).items(self)
        blocks = [tuple(item.weak) for item in items]
        tail = node.body["tail_block"]
        if tail is not None:
            blocks.append(tuple(node.weak[tail["w"] : tail["w"] + tail["count"]]))
        return blocks


class RandomTensors:
    """Weights drawn from a seed."""

    origin = "random"

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._shapes = expected_tensors(config)
        self._seed = seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def get(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed + sum(name.encode()))
        scale = 1.0 if name.endswith("norm.weight") else 0.3
        return torch.randn(self._shapes[name], generator=generator) * scale


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and the two marks of ChatML (the second ends a text)."""
    marks: Iterable[tuple[int, str, bool]] = [(256, "<|im_start|>", True), (257, "<|im_end|>", True)]
    spec = bpe_spec("qwen2", byte_alphabet(), [], marks, origin="test")
    return Tokenizer(spec, eos_ids=[257], bos_id=None, template=TEMPLATE, origin="test")


def tiny_model(*, seed: int = 1, vocab_size: int = 258, max_positions: int = 4096) -> LoadedModel:
    """Two layers, four heads over two KV heads of 8 dimensions."""
    config = ModelConfig(
        architecture="llama", num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=vocab_size, rope_theta=10000.0, rope_scaling=None, rms_norm_eps=1e-5, tie_embeddings=True, qkv_bias=False,
        qk_norm=False, max_positions=max_positions, eos_ids=(257,), bos_id=None,
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    model = Model(config, RandomTensors(config, seed), device=torch.device("cpu"), dtype=torch.float32)
    model_id = blake3(b"tiny" + seed.to_bytes(4, "little")).digest()
    return LoadedModel(
        name="tiny", config=config, model=model, tokenizer=tokenizer, model_id=model_id, tokenizer_id=tokenizer_id(tokenizer.spec_bytes),
        template_id=None, model_id_s=0.0, load_s=0.0,
    )  # fmt: skip
