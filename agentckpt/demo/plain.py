"""What the demo is compared with: the same loop, kept the usual ways.

``PlainSession`` has as much of a session's surface as ``worker.solve`` uses, so both arms run the very same agent.

- *restart*: nothing is kept; after a crash everything begins again.
- *chat + files*: after every turn, and before every call of a declared tool, the conversation (its token ids and the
  loop's state) and a copy of the files are saved. A restart loads them and prefills the tokens. There is no ledger: a
  call whose result was saved is not made again, one that was under way is.

    python -m agentckpt.demo.plain WORKSPACE WITNESS [--keep DIR] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..handles import Handle
from ..session.tools import Effect, Tool
from ..session.values import from_value, to_value
from ..types import EngineLike, LiveSequence, Sandbox
from .agent import Agent
from .worker import open_workspace, say, solve

NONCE = bytes(16)
"""There is no session to draw one; the arms may draw alike."""


class PlainTurn:
    """One turn's calls: made at once, recorded nowhere."""

    def __init__(self, number: int, save: Callable[[], None]) -> None:
        self.number = number
        self._save = save

    def call(self, tool: Any, **arguments: Any) -> Any:
        if isinstance(tool, Tool):
            self._save()
            effect = Effect(key=secrets.token_hex(32), lineage="", turn=self.number, epoch=0)
            return tool(**arguments, effect=effect)
        return from_value(to_value(tool(**arguments)))


class PlainBranch:
    """A fork of the live parts."""

    def __init__(self, kv: LiveSequence, sandbox: Sandbox) -> None:
        self.kv = kv
        self.sandbox = sandbox

    def call(self, tool: Any, **arguments: Any) -> Any:
        return from_value(to_value(tool(**arguments)))

    def close(self) -> None:
        self.kv.close()
        self.sandbox.close()


class PlainSession:
    """The live parts without checkpoints; ``keep`` is where chat and files are saved, or None."""

    def __init__(self, engine: EngineLike, sandbox: Sandbox, keep: Path | None) -> None:
        self.kv = engine.open_sequence(nonce=NONCE)
        self.sandbox = sandbox
        self.state = Agent()
        self.metrics: tuple[Any, ...] = ()
        self._keep = keep
        self._num_turns = 0
        """that have ended"""

    def resume(self) -> int:
        """Take up a saved chat: the number of tokens that were prefilled again."""
        if self._keep is None or not (self._keep / "chat.json").exists():
            return 0
        chat = json.loads((self._keep / "chat.json").read_text())
        self.state.load_state_dict(chat["state"])
        self._num_turns = chat["turn"]
        if chat["tokens"]:
            self.kv.append(chat["tokens"]).result()
            self.kv.score([[chat["tokens"][-1]]]).result()  # waits until the attention state is there
        return len(chat["tokens"])

    def turns(self, until: Callable[[], bool]) -> Iterator[PlainTurn]:
        while not until():
            yield PlainTurn(self._num_turns + 1, self._save)
            self._num_turns += 1
            self._save()

    def _save(self) -> None:
        if self._keep is None:
            return
        self._keep.mkdir(exist_ok=True)
        fresh = self._keep / "files.new"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(self.sandbox.path, fresh, symlinks=True)
        shutil.rmtree(self._keep / "files", ignore_errors=True)
        fresh.rename(self._keep / "files")
        state = {name: list(value) if name == "closed" else value for name, value in self.state.state_dict().items()}
        chat = {"turn": self._num_turns, "tokens": list(self.kv.tokens), "state": state}
        (self._keep / "chat.new").write_text(json.dumps(chat))
        os.replace(self._keep / "chat.new", self._keep / "chat.json")

    @contextmanager
    def fork(self, n: int, **options: Any) -> Iterator[list[PlainBranch]]:
        branches = [PlainBranch(kv, sandbox) for kv, sandbox in zip(self.kv.fork(n), self.sandbox.fork(n), strict=True)]
        try:
            yield branches
        finally:
            for branch in branches:
                branch.close()

    def promote(self, branch: PlainBranch) -> Handle[None]:
        self.sandbox.exchange(branch.sandbox)
        self.kv, branch.kv = branch.kv, self.kv
        return Handle.of(None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agentckpt.demo.plain", description="The same agent without checkpoints.")
    parser.add_argument("workspace")
    parser.add_argument("witness")
    parser.add_argument("--keep", type=Path, help="save chat and files here, and start from there")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    say("started")
    from agentckpt.engine import Engine

    if options.keep is not None and (options.keep / "files").exists():
        shutil.rmtree(options.workspace)
        shutil.copytree(options.keep / "files", options.workspace, symlinks=True)
    with Engine(options.model) as engine:
        session = PlainSession(engine, open_workspace(options.workspace), options.keep)
        begin = time.perf_counter()
        recomputed = session.resume()
        say("resumed", recomputed=recomputed, seconds=time.perf_counter() - begin)
        solve(session, options.witness, options.seed)
        say("finished", tokens=len(session.kv.tokens))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
