"""The included engine: one thread that runs steps, and what happens between them.

Invariants:
1. ``lock`` guards everything but the forward itself. What a running step reads or writes (its sequences' tokens, tables and
   blocks) is changed by nobody else meanwhile: ``between_steps`` puts such changes off to the next boundary.
2. A handle is always completed: with a result, with the error of its step, or with ``ConflictError`` when sequence or engine close.
   It is completed without the lock held.
"""

from __future__ import annotations

import inspect
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from blake3 import blake3

from ..errors import ConflictError, IncompatibleError
from ..handles import Handle
from ..kv import chain
from ..kv.capture import Identity, KVPending
from ..kv.groups import full_group
from ..kv.identity import kv_id, numerics_id
from ..types import EngineLike, LiveSequence, Ref, Sink, Value
from . import attention, blocks, runner, sampler
from . import model as model_source
from .blocks import KV_DTYPES, BlockPool, Order, PagedKV
from .captures import Captures
from .context import Context, Memory, Reuse
from .load import LoadedModel, load_model
from .operations import Generate, Operation, ScoreCandidates, forced_logprob
from .runner import Runner
from .scheduler import Scheduler, Step
from .sequence import Sequence, SequenceState, load_messages
from .staged import Recompute

T = TypeVar("T")
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
DEFAULT_TOKENS = 16384
MAX_SCORED = 1024
"""nodes of one tree of candidates: bounds the scratch KV of ``score``"""
PACK_ROWS = 256


class Engine:
    """Runs one model. ``model`` is a name or path for ``load_model``, or what it returned.

    ``num_blocks`` blocks of ``block_size`` tokens (a power of two up to 128; default room for 16,384 tokens). ``max_batch_tokens``
    is the length of a prefill piece and the largest decode batch. ``kv_order`` is the physical order of the KV tensor.
    ``prefix_reuse``: ``exact`` takes over KV of a known prefix only where this sequence would have computed the very same bytes,
    ``any`` at every known 16 tokens, ``off`` never. ``recompute`` is how KV that is not there is made again: ``exact`` along
    the recorded spans, or ``fast`` by prefill. ``tenant_key`` keys the prefix chain: one engine serves one tenant.

    Raises ``IncompatibleError`` for options that do not fit, and what ``load_model`` raises.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel = "smollm2-135m-instruct",
        *,
        device: str = "cpu",
        dtype: str = "float32",
        kv_dtype: str = "bf16",
        num_blocks: int | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 512,
        kv_order: Order = "block",
        tenant_key: bytes | None = None,
        pin_share: float = 0.1,
        prefix_reuse: Reuse = "exact",
        recompute: Recompute = "exact",
    ) -> None:
        _check_options(kv_dtype, block_size, num_blocks, max_batch_tokens, kv_order, pin_share, prefix_reuse, recompute)
        loaded = model if isinstance(model, LoadedModel) else load_model(model, device=device, dtype=dtype)
        self.loaded = loaded
        self.config = config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.recompute: Recompute = recompute
        self.max_tokens = config.max_positions
        self.max_scored, self.pack_rows = MAX_SCORED, min(PACK_ROWS, max_batch_tokens)
        group = full_group(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=kv_dtype)
        count = num_blocks or max(1, DEFAULT_TOKENS // block_size)
        self.kv = PagedKV(num_blocks=count, block_size=block_size, group=group, device=loaded.model.device, order=kv_order)
        self.pool = BlockPool(count, block_size)
        identity_of_kv = kv_id(loaded.model_id, [group])
        facts = {"piece": max_batch_tokens, "dtype": str(loaded.model.dtype), "kv_dtype": kv_dtype}
        numerics = numerics_id(kernels=_kernel_digest(), device=str(loaded.model.device), facts=facts)
        self.identity = Identity(loaded.model_id, loaded.tokenizer_id, loaded.template_id, identity_of_kv, numerics)
        seed = chain.seed(tenant_key or bytes(32), identity_of_kv)
        self.memory = Memory(self.pool, self.kv, self.identity, seed=seed, piece_tokens=max_batch_tokens, reuse=prefix_reuse)
        self.scheduler = Scheduler(self.memory, max_batch=max_batch_tokens)
        self.lock = threading.Condition(threading.RLock())
        self.num_steps = 0
        self._runner = Runner(loaded.model, self.kv)
        self._captures = Captures(self.pool, self.kv, self.lock, pin_limit=max(1, int(pin_share * count)))
        self._commands: deque[Callable[[], None]] = deque()
        self._finished: list[tuple[Operation, Any, BaseException | None]] = []
        self._step: Step | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    # Public

    def open_sequence(self, *, nonce: bytes | None = None) -> Sequence:
        """A new, empty sequence; the nonce (16 bytes, drawn unless given) enters its sampling."""
        return self.adopt(Context(self.memory), secrets.token_bytes(16) if nonce is None else nonce)

    def import_(self, state: SequenceState) -> Sequence:
        """The sequence of an exported state; its KV is computed when it is needed. Raises ``IncompatibleError`` for another model."""
        if state.model_id != self.identity.model_id.hex():
            raise IncompatibleError(
                object="sequence state", expected=f"model {self.identity.model_id.hex()[:12]}", found=state.model_id[:12],
                code="model-changed",
            )  # fmt: skip
        context = Context(self.memory, tokens=list(state.tokens), computed=state.computed, spans=list(state.spans))
        context.edits, context.messages = list(state.edits), load_messages(state)
        chain.grow(context.links, self.memory.seed, context.tokens, context.computed)
        return self.adopt(context, bytes.fromhex(state.nonce))

    def describe(self) -> Mapping[str, Value]:
        names = ("model_id", "kv_id", "numerics_id", "tokenizer_id")
        ids: dict[str, Value] = {name: getattr(self.identity, name).hex() for name in names}
        return ids | {
            "model": self.loaded.name,
            "device": str(self.kv.device),
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "kv_dtype": self.kv.groups[0].planes[0].dtype,
            "block_size": self.pool.block_size,
            "num_blocks": self.pool.num_blocks,
            "kv_bytes_per_token": self.kv.groups[0].chunk_bytes(1) * self.kv.groups[0].heads,
            "max_tokens": self.max_tokens,
        }

    def check(self) -> None:
        """Raise ``AssertionError`` unless blocks, counts and tables agree."""
        with self.lock:
            contexts = [one.context for one in self.scheduler.sequences]
            self.pool.check([context.table for context in contexts])
            for context in contexts:
                size = self.pool.block_size
                busy = self._step is not None and any(op.sequence.context is context for op in self._step.operations)
                if not busy and len(context.table) != -(-context.valid // size):
                    raise AssertionError(f"{len(context.table)} blocks for {context.valid} positions")
                if not context.valid <= context.computed <= max(len(context.tokens) - 1, 0):
                    raise AssertionError(f"valid {context.valid}, computed {context.computed}, tokens {len(context.tokens)}")

    def stats(self) -> Mapping[str, int]:
        """Counts since the engine was made, and of blocks now."""
        with self.lock:
            return {
                "num_blocks": self.pool.num_blocks, "num_free": self.pool.num_free, "num_pinned": self.pool.num_pinned,
                "num_sequences": len(self.scheduler.sequences), "num_steps": self.num_steps,
                "num_preempted": self.scheduler.num_preempted, "num_reused_tokens": self.memory.num_hit_tokens,
            }  # fmt: skip

    def close(self) -> None:
        """Stop the thread; operations that run end with a ``ConflictError``. Idempotent."""
        with self.lock:
            self._closed = True
            thread, self._thread = self._thread, None
            self.lock.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._complete()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Used by sequences

    def adopt(self, context: Context, nonce: bytes) -> Sequence:
        sequence = Sequence(self, context, nonce)
        with self.lock:
            if self._closed:
                raise ConflictError(object="engine", expected="an open engine", found="a closed one", code="closed")
            self.scheduler.sequences.add(sequence)
        return sequence

    def start(self, operation: Operation) -> Handle[Any]:
        with self.lock:
            if self._closed:
                raise ConflictError(object="engine", expected="an open engine", found="a closed one", code="closed")
            self.scheduler.start(operation)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="agentckpt-engine", daemon=True)
                self._thread.start()
            self.lock.notify_all()
        return Handle(operation.future)

    def between_steps(self, sequence: Sequence, action: Callable[[], T]) -> T:
        """Do ``action`` under the lock while no step uses ``sequence``: now, or at the next boundary."""
        with self.lock:
            if self._step is None or all(operation.sequence is not sequence for operation in self._step.operations):
                result = action()
                self.lock.notify_all()
                done = None
            else:
                done = self._put_off(action)
        if done is not None:
            return done.result()
        self._complete()
        return result

    def _put_off(self, action: Callable[[], T]) -> Future[T]:
        done: Future[T] = Future()

        def command() -> None:
            try:
                done.set_result(action())
            except BaseException as error:
                done.set_exception(error)

        self._commands.append(command)
        return done

    def forget(self, sequence: Sequence) -> None:
        """Close a sequence, under the lock."""
        if sequence.operation is not None:
            error = ConflictError(object="sequence", expected="an open sequence", found="it was closed", code="closed")
            self._end(sequence.operation, None, error)
        sequence.closed = True
        sequence.context.drop()
        self.scheduler.sequences.discard(sequence)

    def capture(self, sequence: Sequence, sink: Sink, previous: Ref | None) -> KVPending:
        return self._captures.take(sequence, lambda cut: self.between_steps(sequence, cut), sink, previous)

    # The loop

    def _loop(self) -> None:
        try:
            while self._advance():
                self._complete()
        except BaseException as error:
            with self.lock:
                self._closed = True
                self._end_all(error)
        self._complete()

    def _advance(self) -> bool:
        """One step. False when the engine is closed."""
        with self.lock:
            step = self._choose()
            if step is None:
                return not self._closed
            self._step = step
        drawn: list[tuple[int, float]] = []
        error: BaseException | None = None
        try:
            drawn = self._run(step)
        except BaseException as raised:
            error = raised
        with self.lock:
            self._step = None
            self.num_steps += 1
            self._apply(step, drawn, error)
            while self._commands:
                self._commands.popleft()()
            self.lock.notify_all()
        return True

    def _choose(self) -> Step | None:
        """Wait until a step can run; None when the engine closes or an operation ended without one."""
        while not self._closed:
            if not self.scheduler.runnable:
                self.lock.wait()
                continue
            step = self.scheduler.next()
            if step is not None:
                return step
            if self.pool.num_pinned == 0 and not any(one.held for one in self.scheduler.sequences):
                self._end(self.scheduler.runnable[0], None, self.scheduler.out_of_blocks())
                return None
            self.lock.wait()
        closed = ConflictError(object="engine", expected="an open engine", found="it was closed", code="closed")
        self._end_all(closed)
        return None

    def _run(self, step: Step) -> list[tuple[int, float]]:
        """The forward; the (token, log-probability) that each row gives, if it was for logits."""
        first = step.operations[0]
        if step.piece is not None:
            piece = step.piece
            logits = self._runner.piece(first.sequence.context, piece.start, piece.num_rows, piece.num_valid, logits=step.logits)
        elif step.logits:
            logits = self._runner.decode([(one.sequence.context, one.sequence.context.computed) for one in step.operations])
        else:
            logits = None
            if step.branches and isinstance(first, ScoreCandidates):
                first.step(self._runner)
        return [] if logits is None else self._sample(step, logits)

    def _apply(self, step: Step, drawn: list[tuple[int, float]], error: BaseException | None) -> None:
        if error is None:
            try:
                self._advance_sequences(step, drawn)
            except BaseException as raised:
                error = raised
        for operation in step.operations:
            context = operation.sequence.context
            if error is not None:
                context.trim()
                self._end(operation, None, error)
            elif context.valid == context.computed >= operation.run_end - operation.wants_logits:
                result = operation.result()
                if result is not None:
                    self._end(operation, result, None)

    def _advance_sequences(self, step: Step, drawn: list[tuple[int, float]]) -> None:
        kind = step.piece.kind if step.piece else "decode" if len(step.operations) == 1 else "batch"
        for operation in step.operations:
            context = operation.sequence.context
            if step.piece is not None and step.again:
                context.rewrote(step.piece.start + step.piece.num_valid)
            elif step.piece is not None or step.logits:
                end = context.computed + (step.piece.num_valid if step.piece else 1)
                context.wrote(end, kind)
        for operation, (token, logprob) in zip(step.operations, drawn, strict=False):
            if isinstance(operation, Generate):
                operation.sequence.context.tokens.append(token)
                operation.take(token, logprob)

    def _sample(self, step: Step, logits: torch.Tensor) -> list[tuple[int, float]]:
        drawn: list[tuple[int, float]] = [(0, 0.0)] * len(step.operations)
        free: list[tuple[int, Generate]] = []
        for row, operation in enumerate(step.operations):
            if isinstance(operation, Generate) and operation.forced is not None:
                token = operation.forced[len(operation.ids)]
                drawn[row] = (token, forced_logprob(logits[row], token))
            elif isinstance(operation, Generate):
                free.append((row, operation))
        sequences = [operation.sequence for _, operation in free]
        sampled = sampler.sample(
            logits[[row for row, _ in free]], [operation.params for _, operation in free],
            [len(sequence.context.tokens) for sequence in sequences], [sequence.nonce for sequence in sequences],
        )  # fmt: skip
        for (row, _), token, logprob in zip(free, *sampled, strict=True):
            drawn[row] = (token, logprob)
        return drawn

    def _end(self, operation: Operation, result: Any, error: BaseException | None) -> None:
        self.scheduler.end(operation)
        self._finished.append((operation, result, error))

    def _end_all(self, error: BaseException) -> None:
        for operation in list(self.scheduler.operations):
            self._end(operation, None, error)
        while self._commands:
            self._commands.popleft()()

    def _complete(self) -> None:
        """Complete handles, without the lock."""
        with self.lock:
            finished, self._finished = self._finished, []
        for operation, result, error in finished:
            if error is None:
                operation.future.set_result(result)
            else:
                operation.future.set_exception(error)


if TYPE_CHECKING:

    def _conforms(engine: Engine, sequence: Sequence) -> tuple[EngineLike, LiveSequence]:
        return engine, sequence


def _kernel_digest() -> bytes:
    """BLAKE3 of the source of everything that computes KV or logits."""
    sources = [inspect.getsource(module) for module in (attention, blocks, model_source, runner)]
    return blake3("\0".join(sources).encode()).digest()


def _check_options(
    kv_dtype: str, block_size: int, num_blocks: int | None, piece: int, order: str, pin_share: float, reuse: str, recompute: str
) -> None:
    rules: list[tuple[str, object, bool, str]] = [
        ("kv_dtype", kv_dtype, kv_dtype in KV_DTYPES, ", ".join(KV_DTYPES)),
        ("block_size", block_size, block_size in BLOCK_SIZES, ", ".join(map(str, BLOCK_SIZES))),
        ("num_blocks", num_blocks, num_blocks is None or num_blocks > 0, "1 or more"),
        ("max_batch_tokens", piece, piece >= 16 and piece % 16 == 0, "a multiple of 16"),
        ("kv_order", order, order in ("block", "layer"), "block, layer"),
        ("pin_share", pin_share, 0 < pin_share <= 1, "above 0, at most 1"),
        ("prefix_reuse", reuse, reuse in ("exact", "any", "off"), "exact, any, off"),
        ("recompute", recompute, recompute in ("exact", "fast"), "exact, fast"),
    ]
    for name, value, good, expected in rules:
        if not good:
            raise IncompatibleError(object=f"engine: {name}", expected=expected, found=str(value), code="bad-option")
