"""One live sequence: the ``kv`` part of an agent, and the one value that describes it (``SequenceState``).

Invariants:
1. One operation at a time: whatever would change the tokens while one runs is a ``ConflictError``.
2. Tokens are added at once; their KV is computed when something needs it. So how it is computed follows from the calls alone,
   never from timing.
3. A capture or fork taken while an operation runs falls between two steps of the engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Sequential
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from blake3 import blake3

from ..errors import CapacityError, ConflictError, IncompatibleError
from ..handles import Handle
from ..nodes import decode, encode
from ..types import Appendable, Generation, Ref, Score, Sink, Source
from . import conversation, scoring
from .context import Context
from .operations import Generate, Operation, ScoreCandidates
from .sampler import SamplingParams

if TYPE_CHECKING:
    from ..kv.capture import KVPending, Message
    from .engine import Engine
    from .staged import Recompute, StagedKV

GENERATE_OPTIONS: dict[str, Any] = {"max_tokens": 256, "stop": (), "seed": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A sequence as integers and strings: no tensors, and nothing that follows from the token ids.

    Grammar, stop buffers and penalties are derived from the ids again. ``messages`` hold content as hex of its encoding.
    """

    tokens: tuple[int, ...]
    computed: int
    spans: tuple[tuple[int, int, str], ...]
    messages: tuple[tuple[str, int, str], ...]
    edits: tuple[tuple[int, int], ...]
    nonce: str
    model_id: str
    kv_id: str


class TokensView(Sequential[int]):
    """The tokens of a sequence, read only, as they stand now."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._tokens[index]

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __eq__(self, other: object) -> bool:
        return list(self._tokens) == list(other) if isinstance(other, Sequential) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._tokens)


class Sequence:
    """Made by ``Engine.open_sequence``. See ``LiveSequence`` in types for the calls."""

    kind = "kv"

    def __init__(self, engine: Engine, context: Context, nonce: bytes) -> None:
        self._engine = engine
        self.context = context
        self.nonce = nonce
        self.operation: Operation | None = None
        self.last_used = 0
        self.paused = False
        self.held = False
        """its blocks are being filled by a restore and must stay"""
        self.closed = False

    @property
    def tokens(self) -> TokensView:
        return TokensView(self.context.tokens)

    @property
    def num_computed(self) -> int:
        """Positions that have KV, in blocks or (after a preemption) to be computed again in the way that the spans say."""
        return self.context.computed

    @property
    def spans(self) -> list[tuple[int, int, str]]:
        return list(self.context.spans)

    @property
    def messages(self) -> list[Message]:
        """(role, first position, content) of the conversation so far, without a reply that no message followed yet."""
        return list(self.context.messages)

    @property
    def num_reused(self) -> int:
        """Positions whose KV was taken over from another sequence with the same text."""
        return sum(length for _, length in self.context.hits)

    # Writing

    def encode(self, item: Appendable) -> list[int]:
        """The ids that ``append(item)`` would add now. Raises ``IncompatibleError`` if they are no pure suffix."""
        return self._encode(item)[0]

    def _encode(self, item: Appendable) -> tuple[list[int], list[Message] | None]:
        tokenizer = self._engine.tokenizer
        if isinstance(item, str):
            return tokenizer.encode(item), None
        added = [item] if isinstance(item, Mapping) else list(item)
        messages = [part for part in added if isinstance(part, Mapping)]
        if messages and len(messages) == len(added):
            return conversation.extend(tokenizer, self.context.tokens, self.context.messages, messages)
        return self._checked_ids(added), None

    def _checked_ids(self, ids: Sequential[Any]) -> list[int]:
        size = self._engine.config.vocab_size
        checked = [int(id) if hasattr(id, "__index__") and not isinstance(id, bool) else -1 for id in ids]
        wrong = [given for given, id in zip(ids, checked, strict=True) if not 0 <= id < size]
        if wrong:
            raise IncompatibleError(
                object="append", expected=f"text, messages, or ids below {size}", found=repr(wrong[0])[:80], code="bad-ids"
            )  # fmt: skip
        return checked

    def append(self, item: Appendable) -> Handle[tuple[int, ...]]:
        self._idle("append")
        ids, messages = self._encode(item)
        with self._engine.lock:
            self._idle("append")
            self._fits(len(ids))
            self.context.tokens.extend(ids)
            if messages is not None:
                self.context.converse(messages)
        return Handle.of(tuple(ids))

    def generate(
        self,
        *,
        max_tokens: int = 256,
        stop: str | Sequential[str] = (),
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        forced: Sequential[int] | None = None,
    ) -> Handle[Generation]:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        stops = _stops(stop)
        if max_tokens < 0:
            raise IncompatibleError(object="generate: max_tokens", expected="0 or more", found=str(max_tokens), code="bad-option")
        ids = None if forced is None else self._checked_ids(list(forced))
        with self._engine.lock:
            self._idle("generate")
            self._not_empty("generate")
            self._fits(0 if ids is None else len(ids))
            room = self._engine.max_tokens - len(self.context.tokens)
            if not (max_tokens if ids is None else len(ids)):
                return Handle.of(Generation("", (), (), "length"))
            self._fits(1)
            operation = Generate(
                self, self._engine.tokenizer, params=params, max_tokens=min(max_tokens, room), stops=stops, forced=ids
            )  # fmt: skip
            return self._engine.start(operation)

    def request_digest(self, **options: Any) -> bytes:
        """32 bytes over position, sampling options, seed and stops, with defaults filled in; ``forced`` does not count."""
        unknown = options.keys() - GENERATE_OPTIONS.keys() - {"forced"}
        if unknown:
            raise TypeError(f"generate has no option {sorted(unknown)[0]!r}")
        full = GENERATE_OPTIONS | {name: value for name, value in options.items() if name != "forced"}
        full |= {"stop": _stops(full["stop"]), "temperature": float(full["temperature"]), "top_p": float(full["top_p"])}
        return blake3(encode(["agentckpt request 1", len(self.context.tokens), full])).digest()

    def score(self, candidates: Sequential[str | Sequential[int]]) -> Handle[list[Score]]:
        """Log-probs of each candidate after the present tokens; nothing of the candidates stays."""
        texts = [self._engine.tokenizer.encode(one) if isinstance(one, str) else self._checked_ids(list(one)) for one in candidates]
        with self._engine.lock:
            self._idle("score")
            self._not_empty("score")
            self._fits(max(map(len, texts), default=0))
            trees = scoring.group(self.context.tokens[-1], texts, self._engine.max_scored)
            lengths = [len(ids) for ids in texts]
            return self._engine.start(ScoreCandidates(self, trees, lengths, pack_rows=self._engine.pack_rows))

    def truncate(self, length: int) -> None:
        with self._engine.lock:
            self._idle("truncate")
            if not 0 <= length <= len(self.context.tokens):
                raise IncompatibleError(
                    object="truncate", expected=f"0 to {len(self.context.tokens)} tokens", found=str(length), code="bad-length"
                )  # fmt: skip
            if length < len(self.context.tokens):
                self.context.truncate(length)

    # Life

    def pause(self) -> None:
        """Run no more steps of this sequence after the present one, until ``resume``. Its blocks stay while there is room."""
        self._engine.between_steps(self, lambda: setattr(self, "paused", True))

    def resume(self) -> None:
        with self._engine.lock:
            self.paused = False
            self._engine.lock.notify_all()

    def fork(self, n: int, *, nonces: Sequential[bytes] | None = None) -> list[Sequence]:
        """``n`` sequences with the same tokens that share the blocks; nonces are drawn unless given."""
        drawn = list(nonces) if nonces is not None else [secrets.token_bytes(16) for _ in range(n)]
        if len(drawn) != n:
            raise IncompatibleError(object="fork: nonces", expected=f"{n}", found=f"{len(drawn)}", code="bad-option")
        self._open("fork")
        return self._engine.between_steps(self, lambda: [self._engine.adopt(self.context.fork(), nonce) for nonce in drawn])

    def capture(self, sink: Sink, previous: Ref | None) -> KVPending:
        """Pin what is new since the last capture. Returns at a step boundary, and waits while too much is pinned."""
        self._open("capture")
        return self._engine.capture(self, sink, previous)

    def prepare(self, source: Source, ref: Ref, *, recompute: Recompute | None = None, model_change: bool = False) -> StagedKV:
        """Build what ``ref`` names aside. ``recompute="fast"`` prefills what has no KV instead of following the spans."""
        from .staged import stage

        return stage(self._engine, self, source, ref, recompute=recompute or self._engine.recompute, model_change=model_change)

    def export(self) -> SequenceState:
        def state() -> SequenceState:
            context, identity = self.context, self._engine.identity
            return SequenceState(
                tokens=tuple(context.tokens), computed=context.computed, spans=tuple(context.spans), edits=tuple(context.edits),
                messages=tuple((role, at, encode(content).hex()) for role, at, content in context.messages), nonce=self.nonce.hex(),
                model_id=identity.model_id.hex(), kv_id=identity.kv_id.hex(),
            )  # fmt: skip

        return self._engine.between_steps(self, state)

    def close(self) -> None:
        """Give back the blocks. An operation that runs ends with a ``ConflictError``. Idempotent."""
        self._engine.between_steps(self, lambda: self._engine.forget(self))

    # Checks

    def _open(self, what: str) -> None:
        if self.closed:
            raise ConflictError(f"cannot {what}", object="sequence", expected="an open sequence", found="a closed one", code="closed")

    def _idle(self, what: str) -> None:
        self._open(what)
        if self.operation is not None:
            raise ConflictError(
                f"cannot {what} while another operation runs", object="sequence", code="busy", hint="wait for the handle of the first"
            )

    def _not_empty(self, what: str) -> None:
        if not self.context.tokens:
            raise IncompatibleError(f"cannot {what} behind nothing", object="sequence", hint="append something first", code="empty")

    def _fits(self, num_more: int) -> None:
        limit, length = self._engine.max_tokens, len(self.context.tokens)
        if length + num_more > limit:
            raise CapacityError(
                object="sequence", expected=f"at most {limit} tokens", found=f"{length} + {num_more}", code="context-full",
                hint="truncate the sequence",
            )  # fmt: skip


def load_messages(state: SequenceState) -> list[Message]:
    return [(role, at, decode(bytes.fromhex(content), max_bytes=1 << 24)) for role, at, content in state.messages]


def _stops(stop: str | Sequential[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    stops = [] if stops == [""] else stops
    if any(not isinstance(one, str) or not one for one in stops):
        raise IncompatibleError(object="generate: stop", expected="texts that are not empty", found=repr(stops), code="bad-option")
    return stops
