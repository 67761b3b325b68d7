"""The ignore patterns do what git does with the same patterns."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from agentckpt.errors import IncompatibleError
from agentckpt.sandbox.ignore import Ignore

PATTERNS = ["*.pyc", "build/", "/top", "a/b", "docs/*.txt", "**/cache", "x/**/y", "f[0-9].o", "q?z", "deep/**", "lib[!s]", "dots.*"]
PATHS = [
    "m.pyc", "d/m.pyc", "m.py", "build/", "d/build/", "build", "top", "d/top", "a/b", "a/bb", "c/a/b", "docs/r.txt", "docs/s/r.txt",
    "cache", "a/cache", "a/b2/cache", "x/y", "x/1/y", "x/1/2/y", "f1.o", "f10.o", "fa.o", "qaz", "q/z", "qz", "deep/er", "deep/er/est",
    "liba", "libs", "lib/", "dots.a", "dotsxa", "d/dots.tar.gz",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_git(pattern: str, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text(pattern + "\n")
    command = ["git", "-C", str(tmp_path), "check-ignore", "--no-index", "--stdin"]
    matched = subprocess.run(command, input="\n".join(PATHS), capture_output=True, text=True).stdout.splitlines()
    ignore = Ignore([pattern])
    for path in PATHS:
        parts = path.rstrip("/").split("/")
        prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        ours = any(ignore(p.encode(), p != prefixes[-1] or path.endswith("/")) for p in prefixes)
        assert ours == (path in matched), path


@pytest.mark.parametrize("pattern", ["!keep", "", "/", "a\\b"])
def test_unsupported_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(IncompatibleError, match="subset"):
        Ignore([pattern])


def test_no_pattern_ignores_nothing() -> None:
    assert not Ignore([])(b"anything", True)


def test_names_that_are_not_utf8_can_be_matched() -> None:
    assert Ignore(["*.o"])(b"\xff\xfe.o", False)
