"""The agent: a normal program on the public API, and the one to copy. Kill it at any moment and start it again: it goes on.

    python -m agentckpt.demo.worker STORE WORKSPACE WITNESS [--seed N]

A turn is one round on one bug. The model reads the tests, is told that they pass, and its own log-probabilities rank
every single edit of the module; the best three are tried side by side in forks of the agent, and the test runner
decides. The winner is promoted. If none passes, what the forks appended is gone with them and the next turn goes on
down the list. After a fix the model writes one more assertion; it goes into the tests only if the test runner agrees.

Everything between the calls is a function of the state, of results and of what the model said, so a killed turn can run
again. What it says on standard output is for whoever watches; nothing waits for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import AgentckptError
from .agent import Agent, checked_assertion, failing_units, function_at
from .edits import Edit, enumerate_edits
from .project import source_path, tests_path
from .ranking import PASSED, rank
from .tools import DEPLOYS

SESSION = "repair"
NUM_BRANCHES = 3
CPU_LIMIT_S = 5
"""of one run of the tests: an edit can make a loop endless, and seconds of the clock would depend on who else is busy"""
CLOCK_LIMIT_S = 600.0
"""far above it: it must never decide"""
RUN_TESTS = f"ulimit -t {CPU_LIMIT_S}; exec {shlex.quote(sys.executable)} -m pytest -q --tb=no -p no:cacheprovider "
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}


def say(event: str, **facts: Any) -> None:
    """One line of JSON for whoever watches."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def solve(session: Any, witness: str, seed: int) -> None:
    """The agent's loop, from wherever the session stands."""
    for turn in session.turns(until=lambda: session.state.done):
        if session.state.failing is None:
            survey(session, turn)
        elif session.state.failing:
            repair(session, turn, seed)
        else:
            release(session, turn, witness)
        tell_cuts(session)


def tell_cuts(session: Any) -> None:
    """What the last published cut cost; between turns that of the turn that ends is still to come."""
    for cost in list(session.metrics)[-1:]:
        say("cut", turn=cost.turn, tokens=cost.num_tokens, pause_s=cost.pause_s, exposed_s=cost.exposed_s, durable_s=cost.durable_s)


def survey(session: Any, turn: Any) -> None:
    """Run all tests once, to learn what fails."""
    say("running", turn=turn.number, tests="all")
    result = turn.call(session.sandbox.run, command=RUN_TESTS + "tests", timeout_s=CLOCK_LIMIT_S)
    session.state.failing = failing_units(result.stdout)
    say("surveyed", turn=turn.number, failing=len(session.state.failing))


def repair(session: Any, turn: Any, seed: int) -> None:
    """One round on the first failing unit."""
    agent = session.state
    unit = agent.failing[0]
    source = session.sandbox.read_file(source_path(unit)).decode()
    edits = enumerate_edits(source)
    if not agent.order:
        tests = session.sandbox.read_file(tests_path(unit)).decode()
        session.kv.append(tests + PASSED).result()
        say("scoring", turn=turn.number, bug=unit, candidates=len(edits))
        begin = time.perf_counter()
        agent.order = [index for index, _ in rank(session.kv, source, edits)]
        say("scored", turn=turn.number, bug=unit, seconds=time.perf_counter() - begin)
    tried = agent.order[agent.num_tried : agent.num_tried + NUM_BRANCHES]
    say("trying", turn=turn.number, bug=unit, first=agent.num_tried + 1, last=agent.num_tried + len(tried))
    winner = try_in_forks(session, unit, [edits[index] for index in tried])
    if winner is None:
        session.state.num_tried += len(tried)
        if session.state.num_tried >= len(edits):
            raise RuntimeError(f"no single edit of {unit} passes its tests")
        return
    close(session, turn, unit, edits, winner, seed)


def try_in_forks(session: Any, unit: str, edits: Sequence[Edit]) -> int | None:
    """Try each edit in a fork; promote the first that passes: its place in ``edits``, or None."""
    begin = time.perf_counter()
    with session.fork(len(edits), seeds=range(len(edits)), effects="deny", durable=False) as branches:
        say("forked", bug=unit, branches=len(branches), seconds=time.perf_counter() - begin)
        with ThreadPoolExecutor(len(branches)) as threads:
            passed = list(threads.map(lambda branch, edit: passes(branch, unit, edit), branches, edits))
        winner = next((place for place, good in enumerate(passed) if good), None)
        if winner is not None:
            session.promote(branches[winner]).result()
        say("tried", bug=unit, passed=sum(passed), winner=winner)
    return winner


def passes(branch: Any, unit: str, edit: Edit) -> bool:
    """Write the edited module into a branch's own files and context, and run its tests there."""
    branch.sandbox.write_file(source_path(unit), edit.text)
    branch.kv.append(edit.text).result()
    result = branch.call(branch.sandbox.run, command=RUN_TESTS + tests_path(unit), timeout_s=CLOCK_LIMIT_S)
    return bool(result.exit_code == 0)


def close(session: Any, turn: Any, unit: str, edits: Sequence[Edit], winner: int, seed: int) -> None:
    """A bug is fixed: ask for one more assertion, and note what it took."""
    agent = session.state
    tries = agent.num_tried + winner + 1
    edit = edits[agent.order[tries - 1]]
    ranking = hashlib.sha256(repr(agent.order).encode()).hexdigest()[:16]
    assertion = one_more_assertion(session, turn, unit, function_at(edit.text, edit.line), seed)
    agent.closed.append(
        {"bug": unit, "candidates": len(edits), "tries": tries, "edit": str(edit), "ranking": ranking, "assertion": assertion}
    )  # fmt: skip
    agent.failing, agent.order, agent.num_tried = agent.failing[1:], [], 0
    say("closed", turn=turn.number, tokens=len(session.kv.tokens), **agent.closed[-1])


def one_more_assertion(session: Any, turn: Any, unit: str, function: str, seed: int) -> str | None:
    """Let the model write one line; it goes into the tests if it is new and the runner agrees. The context keeps what became of it."""
    opening = f"\n\ndef test_{function}_again():\n"
    session.kv.append(f"{opening}    assert {function}(").result()
    say("generating", turn=turn.number, bug=unit)
    text = session.kv.generate(max_tokens=32, stop="\n", temperature=0.7, top_p=0.9, seed=seed).result().text
    tests = session.sandbox.read_file(tests_path(unit)).decode()
    line = checked_assertion(f"assert {function}({text}", function, tests)
    verdict = "not tried" if line is None else "fails"
    if line is not None:
        session.sandbox.write_file(tests_path(unit), f"{tests}\n{opening}    {line}\n")
        result = turn.call(session.sandbox.run, command=RUN_TESTS + tests_path(unit), timeout_s=CLOCK_LIMIT_S)
        if result.exit_code == 0:
            verdict = "passes"
        else:
            session.sandbox.write_file(tests_path(unit), tests)
    session.kv.append(f"    # {verdict}\n\n\n").result()
    return line if verdict == "passes" else None


def release(session: Any, turn: Any, witness: str) -> None:
    """Deploy what was repaired, in three ways; nothing is generated any more."""
    fixed = "".join(session.sandbox.read_file(source_path(bug["bug"])).decode() for bug in session.state.closed)
    version = hashlib.sha256(fixed.encode()).hexdigest()[:12]
    for deploy in DEPLOYS:
        if deploy.spec.name not in session.state.deployed:
            say("deploying", turn=turn.number, tool=deploy.spec.name, version=version)
            turn.call(deploy, version=version, url=witness)
            session.state.deployed.append(deploy.spec.name)


def main(arguments: Sequence[str] | None = None, *, wrap: Callable[[Any], Any] = lambda engine: engine) -> int:
    """``wrap`` is for controls: it is given the engine and returns what the session gets."""
    parser = argparse.ArgumentParser(prog="python -m agentckpt.demo.worker", description="Repair the project in WORKSPACE.")
    parser.add_argument("store")
    parser.add_argument("workspace")
    parser.add_argument("witness", help="address of the server to deploy to")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0, help="of what the model samples")
    options = parser.parse_args(arguments)
    say("started")
    try:
        run(options, wrap)
    except AgentckptError as error:
        say("stopped", error=type(error).__name__, code=error.code, message=str(error), exit_code=error.exit_code)
        return error.exit_code
    return 0


def run(options: argparse.Namespace, wrap: Callable[[Any], Any]) -> None:
    import agentckpt
    from agentckpt.engine import Engine

    with Engine(options.model) as engine:
        say("loaded")
        workspace = open_workspace(options.workspace)
        with agentckpt.Session.open(options.store, SESSION, kv=wrap(engine), sandbox=workspace, state=Agent) as session:
            say("opened", **restored_facts(session.restored))
            solve(session, options.witness, options.seed)
            num_tokens = len(session.kv.tokens)
        tell_cuts(session)
        say("finished", tokens=num_tokens)


def open_workspace(path: str) -> Any:
    """Tests need no network: denied where the kernel lets us, else declared, and the manifest says which."""
    from agentckpt.sandbox import Workspace

    workspace = Workspace(path, env=ENVIRONMENT)
    return workspace if workspace.denies_network else Workspace(path, env=ENVIRONMENT, network="declared-harmless")


def restored_facts(report: Any) -> dict[str, Any]:
    """What came back, for whoever watches; empty for a new session."""
    if report is None:
        return {"restored": False}
    kv = report.parts["kv"]
    effects = {"replayed": len(report.replayed), "rerun": len(report.rerun), "unknown": len(report.unknown)}
    tokens = {"tokens": kv.restored + kv.recomputed, "recomputed": kv.recomputed, "reason": kv.reason}
    return {"restored": True, "turn": report.turn, **tokens, **effects, "seconds": dict(report.seconds), "kv_seconds": dict(kv.seconds)}


if __name__ == "__main__":
    raise SystemExit(main())
