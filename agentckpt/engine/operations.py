"""What a sequence may be asked to do, as small state machines that survive a preemption at any step.

An operation keeps no position of its own: what comes next follows from the sequence's tokens and computed length.

Invariants:
1. The tokens through the one that completes a stop stay in the sequence; the text ends before it. Both are functions of the
   ids and the stops alone, so that ``forced`` ids give the same result.
2. Every generated token but the last one has KV; each was computed by a forward of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from ..types import Generation, Score
from .conversation import ChatTokenizer
from .runner import Branches, Runner
from .sampler import SamplingParams
from .scoring import Tree

if TYPE_CHECKING:
    from .sequence import Sequence as LiveSequence


class Operation:
    """Compute KV up to position ``goal``; the base of the others."""

    def __init__(self, sequence: LiveSequence, goal: int = 0) -> None:
        self.sequence = sequence
        self.order = 0
        self.future: Future[Any] = Future()
        self._goal = goal

    @property
    def run_end(self) -> int:
        """Positions below this are to be computed as append pieces."""
        return self._goal

    @property
    def wants_logits(self) -> bool:
        """Is the position ``run_end - 1`` computed for its logits?"""
        return False

    def result(self) -> Any:
        """What the handle gives; None while there is more to do. Called when no KV is missing."""
        return self._goal


class Generate(Operation):
    """Decode until a stop, an end token, or ``max_tokens``."""

    def __init__(
        self,
        sequence: LiveSequence,
        tokenizer: ChatTokenizer,
        *,
        params: SamplingParams,
        max_tokens: int,
        stops: Sequence[str],
        forced: Sequence[int] | None,
    ) -> None:
        super().__init__(sequence)
        self.params = params
        self.forced = forced
        self._max_tokens = max_tokens if forced is None else len(forced)
        self._writing = Writing(tokenizer, stops)
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    @property
    def run_end(self) -> int:
        return len(self.sequence.context.tokens)

    @property
    def wants_logits(self) -> bool:
        return True

    def take(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        self._writing.add(token)

    def result(self) -> Generation | None:
        reason = self._writing.ended
        if len(self.ids) < self._max_tokens and (reason is None or self.forced is not None):
            return None
        return Generation(self._writing.text(), tuple(self.ids), tuple(self.logprobs), reason or "length")


class Writing:
    """Text of ids as they come, watched for stops. Bytes are compared, so a stop may begin within a token."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop.encode() for stop in stops]
        self._longest = max(map(len, self._stops), default=0)
        self._written = bytearray()
        self._end: int | None = None
        self.ended: str | None = None

    def add(self, token: int) -> None:
        if self.ended is not None:
            return
        before = len(self._written)
        self._written += self._tokenizer.token_bytes(token)
        found = [at for stop in self._stops if (at := self._written.find(stop, max(0, before - self._longest + 1))) >= 0]
        if found:
            self.ended, self._end = "stop", min(found)
        elif token in self._tokenizer.eos_ids:
            self.ended, self._end = "eos", before

    def text(self) -> str:
        return bytes(self._written[: self._end]).decode("utf-8", "replace")


class ScoreCandidates(Operation):
    """Log-probabilities of candidates behind the present tokens."""

    def __init__(self, sequence: LiveSequence, trees: Sequence[Tree], lengths: Sequence[int], *, pack_rows: int) -> None:
        super().__init__(sequence, goal=len(sequence.context.tokens) - 1)
        self._trees = list(trees)
        self._pack_rows = pack_rows
        self._branches: Branches | None = None
        self._logprobs = [[0.0] * length for length in lengths]

    def step(self, runner: Runner) -> None:
        """Forward one pack."""
        if self._branches is None:
            self._branches = Branches(runner, self._trees.pop(0), pack_rows=self._pack_rows)
        self._branches.step(self.sequence.context)
        if self._branches.finished:
            for number, index, value in self._branches.found:
                self._logprobs[number][index] = value
            self._branches = None

    def result(self) -> list[Score] | None:
        if self._trees or self._branches is not None:
            return None
        return [Score(sum(values), tuple(values)) for values in self._logprobs]


def forced_logprob(logits: torch.Tensor, token: int) -> float:
    """Log-softmax of the raw logits ``[vocab]`` at ``token``, as the sampler computes it."""
    wide = logits.double()
    return float((wide[token] - torch.logsumexp(wide, dim=-1)).float())
