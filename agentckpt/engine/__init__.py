"""The included engine: runs a model on paged KV that can be captured, restored, forked and moved."""

from .engine import Engine
from .sampler import SamplingParams
from .sequence import Sequence, SequenceState

__all__ = ["Engine", "SamplingParams", "Sequence", "SequenceState"]
