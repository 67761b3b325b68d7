"""``agentckpt demo``: start the agent, kill it, start it again, and compare it with a twin that was left alone."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from ..errors import ConflictError
from . import runs
from .census import Census, take_census
from .compare import Account, account
from .kills import draw_plans
from .processes import Event
from .project import draw_bugs
from .results import DemoResult
from .runs import Commentary, Note, Outcome, Setting
from .verdict import assemble, judge
from .worker import SESSION

RULE = "a 135M model ranks the edits by likelihood, the tests decide; every planted bug is one edit away"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``agentckpt demo``."""
    parser.add_argument("--seed", type=int, default=1, help="of the bugs, the kills and what the model samples (default: 1)")
    parser.add_argument("--bugs", type=int, default=12, metavar="N", help="how many bugs to plant, 1 to 24 (default: 12)")
    parser.add_argument("--keep", metavar="DIR", help="an absent or empty directory for everything (default: a temporary one, kept)")
    parser.add_argument("--manual", action="store_true", help="print the worker's process id and leave the killing to you")
    parser.add_argument("--no-arms", action="store_true", help="leave out the two ways without checkpoints")
    parser.add_argument(
        "--break", dest="broken", choices=("kv", "verify-off"), help="a control: damage stored KV, or restore zeros in its place"
    )  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path (default: smollm2-135m-instruct)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at the same time (default: 2)")


def run(args: argparse.Namespace) -> DemoResult:
    """Run the demo; progress goes to ``args.screen.note`` if there is one.

    Raises ``ConflictError`` (``--keep`` is in use), ``StoreError`` (a worker failed), ``ValueError`` (number of bugs).
    """
    begin = time.monotonic()
    screen = getattr(args, "screen", None)
    note: Note = screen.note if screen is not None else _silent
    bugs = draw_bugs(args.seed, args.bugs)
    root = _root(args.keep)
    setting = Setting(root, args.seed, bugs, draw_plans(args.seed, len(bugs)), args.model, args.broken, args.manual, note)
    _announce(setting)
    census = take_census(bugs)
    outcomes = _run_all(setting, census, with_arms=not (args.no_arms or args.manual), jobs=args.jobs)
    accounts = {name: account(root / name / "store", SESSION) for name in ("reference", "killed")}
    probed = _probe(setting, accounts["killed"])
    result = assemble(setting, census, outcomes, accounts, probed)
    return replace(judge(result), seconds=time.monotonic() - begin)


def _silent(text: str) -> None:
    """Nobody watches."""


def _root(keep: str | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="agentckpt-demo-"))
    root = Path(keep).absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConflictError("is in use", object=keep, expected="an absent or empty directory", hint="name another one with --keep")
    root.mkdir(parents=True, exist_ok=True)
    return root


def _announce(setting: Setting) -> None:
    note = setting.note
    note(f"seed {setting.seed}: {len(setting.bugs)} planted bugs; everything is kept in {setting.root}")
    note(RULE)
    if setting.manual:
        return
    for plan in setting.plans:
        where = f"in the window of {plan.tool}" if plan.kind == "window" else f"at bug {plan.bug + 1} of {len(setting.bugs)}"
        note(f"kill drawn: {plan.kind}, {where}, {plan.wait_s * 1000:.0f} ms after the parent sees it begin")


def _run_all(setting: Setting, census: Sequence[Census], *, with_arms: bool, jobs: int) -> dict[str, Outcome]:
    """All runs, the longest first, ``jobs`` at a time."""
    work: dict[str, Callable[[], Outcome]] = {}
    if with_arms:
        work["restart"] = lambda: runs.arm(setting, "restart")
    work["killed"] = lambda: runs.killed(setting, Commentary(setting, census))
    if with_arms:
        work["chat"] = lambda: runs.arm(setting, "chat")
    work["reference"] = lambda: runs.reference(setting)
    with ThreadPoolExecutor(1 if setting.manual else max(1, jobs)) as threads:
        running = {name: threads.submit(job) for name, job in work.items()}
        try:
            for future in as_completed(running.values()):
                future.result()
        except BaseException:
            setting.crew.stop()
            raise
        return {name: future.result() for name, future in running.items()}


def _probe(setting: Setting, killed: Account) -> Event:
    """Time a restore and a re-prefill of the same context, alone."""
    arguments = [str(setting.root / "killed" / "store"), killed.cut, "--model", setting.model]
    with setting.crew.start("agentckpt.demo.probe", arguments, log=setting.root / "probe.log") as worker:
        worker.expect(0)
        return next(event for event in worker.events if event.name == "probed")
