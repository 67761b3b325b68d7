"""A deterministic in-memory engine for fast tests: tokens are bytes of text, the "model" is a hash.

It keeps the rules of ``LiveSequence``: a capture pins the tokens of its instant, ``forced`` samples nothing, forks are independent.
``num_sampled`` counts tokens that were really drawn, so a test can tell a replay from a second run of the model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from agentckpt import Session, Store
from agentckpt.errors import ConflictError, IncompatibleError
from agentckpt.handles import Handle
from agentckpt.nodes import Node, decode_node, encode_node
from agentckpt.types import Appendable, Generation, PartRef, PartReport, Ref, Score, Sink, Source

CHUNK_TOKENS = 64
T = TypeVar("T")


class ToyEngine:
    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        """how long an append or a generation takes; another operation meanwhile is refused, as by the included engine"""
        self.num_sampled = 0
        self.num_open = 0

    def open_sequence(self, *, nonce: bytes) -> ToySequence:
        return ToySequence(self, nonce)

    def describe(self) -> Mapping[str, Any]:
        return {"model": "toy"}


class ToySequence:
    kind = "kv"

    def __init__(self, engine: ToyEngine, nonce: bytes, tokens: Sequence[int] = ()) -> None:
        self.engine = engine
        self.nonce = nonce
        self.ids = list(tokens)
        self.closed = False
        self.num_pins = 0
        self.busy = False
        engine.num_open += 1

    @property
    def tokens(self) -> Sequence[int]:
        return self.ids

    @property
    def num_computed(self) -> int:
        return max(0, len(self.ids) - 1)

    def encode(self, item: Appendable) -> list[int]:
        if isinstance(item, str):
            return list(item.encode())
        if isinstance(item, Mapping):
            return list(json.dumps(dict(item), sort_keys=True).encode())
        return [part for piece in item for part in (self.encode(piece) if isinstance(piece, Mapping) else [int(piece)])]

    def append(self, item: Appendable) -> Handle[tuple[int, ...]]:
        self._idle()
        added = self.encode(item)
        if any(not 0 <= number < 256 for number in added):
            return Handle.failed(IncompatibleError("not a token", object="toy"))
        self.ids += added
        return self._later(tuple(added))

    def generate(self, *, forced: Sequence[int] | None = None, **options: Any) -> Handle[Generation]:
        self._idle()
        made: list[int] = []
        for position in range(options.get("max_tokens", 8)) if forced is None else range(len(forced)):
            made.append(self._draw(options.get("seed", 0)) if forced is None else forced[position])
            self.ids.append(made[-1])
        return self._later(Generation(bytes(made).decode("latin-1"), tuple(made), tuple(0.0 for _ in made), "length"))

    def _idle(self) -> None:
        if self.busy:
            raise ConflictError("another operation runs", object="toy", code="busy")

    def _later(self, value: T) -> Handle[T]:
        if not self.engine.delay_s:
            return Handle.of(value)
        self.busy, future = True, Future()

        def finish() -> None:
            self.busy = False
            future.set_result(value)

        threading.Timer(self.engine.delay_s, finish).start()
        return Handle(future)

    def _draw(self, seed: int) -> int:
        self.engine.num_sampled += 1
        mixed = blake3(self.nonce + seed.to_bytes(8, "little") + bytes(self.ids[-32:]) + len(self.ids).to_bytes(8, "little"))
        return 97 + mixed.digest()[0] % 26

    def request_digest(self, **options: Any) -> bytes:
        return blake3(json.dumps([len(self.ids), options], sort_keys=True).encode()).digest()

    def score(self, candidates: Sequence[str | Sequence[int]]) -> Handle[list[Score]]:
        return Handle.of([Score(-float(blake3(bytes(self.ids) + repr(item).encode()).digest()[0]), ()) for item in candidates])

    def truncate(self, length: int) -> None:
        self._idle()
        del self.ids[length:]

    def fork(self, n: int) -> list[ToySequence]:
        return [ToySequence(self.engine, self.nonce, self.ids) for _ in range(n)]

    def capture(self, sink: Sink, previous: Ref | None) -> ToyPending:
        self._idle()
        self.num_pins += 1
        return ToyPending(self, sink, bytes(self.ids))

    def prepare(self, source: Source, ref: Ref) -> ToyStaged:
        node = decode_node(source.get(ref, 2**20))
        tokens = b"".join(source.get(chunk, CHUNK_TOKENS) for chunk in node.strong)
        return ToyStaged(self, tokens)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.engine.num_open -= 1


class ToyPending:
    def __init__(self, sequence: ToySequence, sink: Sink, tokens: bytes) -> None:
        self.sequence, self.sink, self.tokens = sequence, sink, tokens
        self.done = False

    def write(self) -> PartRef:
        try:
            pieces = [self.tokens[at : at + CHUNK_TOKENS] for at in range(0, len(self.tokens), CHUNK_TOKENS)]
            chunks = [self.sink.put("chunk", piece) for piece in pieces]
            node = Node("kv", chunks, [], {"n": len(self.tokens)})
            facts: dict[str, Any] = {"num_tokens": len(self.tokens), "num_computed": max(0, len(self.tokens) - 1)}
            return PartRef("kv", self.sink.put("node", encode_node(node)), facts)
        finally:
            self.cancel()

    def cancel(self) -> None:
        if not self.done:
            self.done = True
            self.sequence.num_pins -= 1


class ToyStaged:
    def __init__(self, sequence: ToySequence, tokens: bytes) -> None:
        self.sequence, self.tokens = sequence, tokens

    def commit(self) -> PartReport:
        self.sequence.ids = list(self.tokens)
        return PartReport("kv", restored=len(self.tokens), continuation="exact")

    def abort(self) -> None:
        return None


class Agent:
    """A small state: a counter, and what was seen."""

    def __init__(self) -> None:
        self.step = 0
        self.seen: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.seen = state["step"], list(state["seen"])


class Opener:
    """Opens sessions on the same store and workspace, as runs of one program would."""

    def __init__(self, store: Store, engine: ToyEngine, workspace: Path) -> None:
        self.store, self.engine, self.workspace = store, engine, workspace

    def __call__(self, name: str = "agent", **options: object) -> Session:
        full = {"kv": self.engine, "sandbox": self.workspace, "state": Agent, **options}
        return Session.open(self.store, name, **full)  # type: ignore[arg-type]
