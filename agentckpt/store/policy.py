"""Which checkpoints keep their KV when the store is pruned.

    all            every checkpoint
    keep-last=K    the last K checkpoints of each session (0: none)
    forks          checkpoints from which a session was forked
    pinned         checkpoints with a tag

Words are joined by commas and add up. A checkpoint that is kept keeps the KV of the children that it pins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..errors import IncompatibleError
from .closure import Reached, live_sessions
from .view import View

DEFAULT: Final = "keep-last=1,forks,pinned"


@dataclass(frozen=True, slots=True)
class Policy:
    """``keep_last`` None: every checkpoint."""

    keep_last: int | None = 1
    forks: bool = True
    pinned: bool = True

    def __str__(self) -> str:
        if self.keep_last is None:
            return "all"
        return ",".join([f"keep-last={self.keep_last}", *["forks"] * self.forks, *["pinned"] * self.pinned])


def parse_policy(text: str | Policy) -> Policy:
    """Raises ``IncompatibleError`` (code ``bad-policy``) for a word that means nothing here."""
    if isinstance(text, Policy):
        return text
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["all"]:
        return Policy(keep_last=None)
    keep_last = 0
    for word in words:
        name, equals, number = word.partition("=")
        if name == "keep-last" and equals and number.isascii() and number.isdigit() and len(number) < 10:
            keep_last = int(number)
        elif word not in ("forks", "pinned"):
            raise _bad(text, word)
    if not words:
        raise _bad(text, "nothing")
    return Policy(keep_last, "forks" in words, "pinned" in words)


def kept_kv(view: View, reached: Reached, policy: Policy) -> set[bytes]:
    """Ids of the manifests whose KV stays."""
    if policy.keep_last is None:
        return set(reached.manifests)
    kept: set[bytes] = set()
    for session in live_sessions(view):
        heads = [bytes(head["manifest"]) for head in session.heads]
        last = list(dict.fromkeys(reversed(heads)))
        kept.update(last[: policy.keep_last])
    if policy.forks:
        kept |= fork_points(view)
    if policy.pinned:
        kept |= set(view.tags.values())
    waiting = list(kept)
    while waiting:
        links = reached.manifests.get(waiting.pop())
        new = {child[1:] for child in links.children} - kept if links else set()
        kept |= new
        waiting.extend(new)
    return kept


def fork_points(view: View) -> set[bytes]:
    """Checkpoints from which a session that still stands was forked: what its first head names, and the parent's head then."""
    found: set[bytes] = set()
    for session in live_sessions(view):
        found.update(bytes(head["manifest"]) for head in session.heads if head["reason"] == "fork")
        parent = view.sessions.get((session.parent or {}).get("sid", b""))
        if parent is not None and session.parent is not None:
            then = [bytes(head["manifest"]) for head in parent.heads if head["sseq"] <= session.parent["sseq"]]
            found.update(then[-1:])
    return found


def _bad(text: str, word: str) -> IncompatibleError:
    return IncompatibleError(
        "is no policy for KV", object=repr(text), expected="all, or words of keep-last=K, forks, pinned", found=word, code="bad-policy"
    )
