"""A restore that is built aside: read, verify, scatter into free blocks, compute what is missing; then swap.

Invariants:
1. The live sequence is untouched until ``commit``; ``abort``, or an error on the way, gives every block back.
2. A position has KV that was verified, or that was computed here. Nothing between.
3. The report says which, and whether the continuation has the very same bytes as the captured one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequential
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..errors import ConflictError, IncompatibleError
from ..kv import chain
from ..kv import spans as span_rules
from ..kv.capture import Base, Run
from ..kv.restore import Image, Loaded, load_blocks, read_image
from ..types import Continuation, PartReport, Ref, Source
from .context import Context
from .operations import Operation

if TYPE_CHECKING:
    from .engine import Engine
    from .sequence import Sequence

Recompute = Literal["exact", "fast"]


@dataclass(slots=True)
class StagedKV:
    """See ``Staged`` in types."""

    engine: Engine
    live: Sequence
    shadow: Sequence
    report: PartReport
    committed: bool = False

    def commit(self) -> PartReport:
        """Take over. Raises ``ConflictError`` if an operation of the live sequence runs, or after ``abort``."""
        if not self.committed:
            self.engine.between_steps(self.live, self._swap)
        return self.report

    def _swap(self) -> None:
        if self.live.operation is not None or self.live.closed:
            raise ConflictError(object="sequence", expected="an idle sequence to restore into", found="a busy or closed one", code="busy")
        if self.shadow.closed:
            raise ConflictError(object="kv restore", expected="a staged restore", found="an aborted one", code="aborted")
        self.live.context, self.shadow.context = self.shadow.context, self.live.context
        self.committed = True
        self.engine.forget(self.shadow)

    def abort(self) -> None:
        """Give the blocks back; the live sequence stays as it is. Idempotent, and nothing after ``commit``."""
        if not self.committed and not self.shadow.closed:
            self.shadow.close()


def stage(engine: Engine, live: Sequence, source: Source, ref: Ref, *, recompute: Recompute, model_change: bool) -> StagedKV:
    """Read ``ref``. Raises as ``read_image``; ``IncompatibleError`` for another model unless ``model_change``."""
    begun = time.perf_counter()
    image = read_image(source, ref, max_tokens=engine.max_tokens, vocab_size=engine.config.vocab_size)
    _check_model(engine, image, model_change=model_change)
    shadow = engine.adopt(_context(engine, image), live.nonce)
    try:
        shadow.held = True
        read = time.perf_counter()
        loaded = _load(engine, shadow, source, image)
        copied = time.perf_counter()
        report = _finish(engine, shadow, source, image, loaded, recompute)
    except BaseException:
        shadow.held = False
        shadow.close()
        raise
    seconds = {"read": read - begun, "load": copied - read, "recompute": time.perf_counter() - copied}
    return StagedKV(engine, live, shadow, replace(report, seconds=seconds))


def _check_model(engine: Engine, image: Image, *, model_change: bool) -> None:
    mine = engine.identity
    if image.model_id == mine.model_id:
        return
    if not model_change:
        raise IncompatibleError(
            object="kv part", expected=f"model {image.model_id.hex()[:12]}", found=f"engine with {mine.model_id.hex()[:12]}",
            hint="load the same weights, or pass model_change=True to go on with another model", code="model-changed",
        )  # fmt: skip
    if image.tokenizer_id != mine.tokenizer_id:
        raise IncompatibleError(
            "the other model has another tokenizer", object="kv part", expected=f"tokenizer {image.tokenizer_id.hex()[:12]}",
            found=mine.tokenizer_id.hex()[:12], hint="append the conversation's messages to a new sequence", code="tokenizer-changed",
        )  # fmt: skip


def _context(engine: Engine, image: Image) -> Context:
    context = Context(engine.memory, tokens=image.tokens, spans=image.spans, messages=image.messages, edits=image.edits)
    chain.grow(context.links, engine.memory.seed, context.tokens, image.computed)
    return context


def _load(engine: Engine, shadow: Sequence, source: Source, image: Image) -> Loaded:
    if image.kv_id is None or image.kv_id != engine.identity.kv_id or image.groups != engine.kv.groups:
        same = image.kv_id is None
        return Loaded(0, 0, ("no KV was captured" if image.computed else None) if same else "the KV has another form (kv_id)")
    return load_blocks(source, image, engine.kv, lambda first, end: _take_blocks(engine, shadow, end))


def _take_blocks(engine: Engine, shadow: Sequence, end: int) -> Sequential[Run] | None:
    """Blocks for the next positions up to ``end``, or None if none can be had now."""
    with engine.lock:
        context = shadow.context
        first = context.valid
        if not engine.scheduler.make_room(None, context, end):
            return None
        context.prepare(end)
        context.valid = context.computed = end
        return context.runs(first, end)


def _finish(engine: Engine, shadow: Sequence, source: Source, image: Image, loaded: Loaded, recompute: Recompute) -> PartReport:
    """Compute what the store could not give, and say what happened."""
    context = shadow.context
    with engine.lock:
        context.valid = loaded.restored
        context.computed = image.computed
        context.trim()
        context.base = Base(image.written(source), image.marks(loaded.restored))
        context.marks = [context.base.marks]
        if recompute == "fast" and context.valid < context.computed:
            context.computed = context.valid
            span_rules.cut(context.spans, context.computed, engine.memory.piece_tokens)
            del context.links[context.computed // chain.LINK_TOKENS :]
            context.lower()
        repeatable = all(kind != "batch" for _, _, kind in span_rules.covering(context.spans, loaded.restored, image.computed, 1 << 30))
        context.next_recompute()
        restored = context.valid
        context.publish(0)
        shadow.held = False
        engine.lock.notify_all()
    recomputed = image.computed - restored
    if recomputed:
        engine.start(Operation(shadow, goal=image.computed)).result()
    return PartReport(
        kind="kv",
        restored=restored,
        recomputed=recomputed,
        rejected=loaded.rejected,
        reason=loaded.reason,
        continuation=_continuation(engine, image, recomputed, recompute, repeatable=repeatable),
    )


def _continuation(engine: Engine, image: Image, recomputed: int, recompute: Recompute, *, repeatable: bool) -> Continuation:
    if recomputed and recompute == "fast":
        return "prefix-equivalent"
    if not image.computed:
        return "exact"
    same = image.numerics_id == engine.identity.numerics_id and image.kv_id == engine.identity.kv_id
    return "exact" if same and (repeatable or not recomputed) else "compatible, not bit-exact"
