"""The layers of ARCHITECTURE.md, read from the source: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "agentckpt"
BOTTOM = {"types", "errors", "handles"}
MAY = {
    "types": {"handles"},  # for annotations only
    "errors": set(),
    "handles": set(),
    "nodes": BOTTOM,
    "store": BOTTOM | {"nodes"},
    "kv": BOTTOM | {"nodes"},
    "sandbox": BOTTOM | {"nodes"},
    "ledger": BOTTOM | {"nodes"},
    "manifest": BOTTOM | {"nodes"},
    "session": BOTTOM | {"nodes", "store", "ledger", "manifest", "sandbox"},
    "engine": BOTTOM | {"nodes", "kv"},
    "testing": BOTTOM | {"nodes", "store"},
    "demo": BOTTOM | {"nodes", "store", "ledger", "manifest", "sandbox", "session", "engine", "kv", "testing", "cli"},
    "cli": BOTTOM | {"nodes", "store", "ledger", "manifest", "sandbox", "session", "engine", "kv", "testing", "demo"},
}
TORCH_AT_IMPORT = {"kv", "engine"}
TORCH_EVER = TORCH_AT_IMPORT | {"cli", "demo"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, at import time) of every import in a file; relative ones resolved."""
    tree = ast.parse(path.read_text())
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    package = ("agentckpt", *path.relative_to(ROOT).parts[:-1])
    found = []
    for node in ast.walk(tree):
        top = id(node) not in inner
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(".".join([*base, name]), top) for name in names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "agentckpt" else [f"agentckpt.{a.name}" for a in node.names]
            found += [(name, top) for name in names]
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py" and layer_of(p) in MAY)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    layer = layer_of(path)
    for name, top in imports(path):
        parts = name.split(".")
        if parts[0] == "torch":
            assert layer in TORCH_EVER, f"{layer} must not import torch"
            assert layer in TORCH_AT_IMPORT or not top, f"{layer} must not import torch at import"
        if parts[0] == "agentckpt" and len(parts) > 1 and parts[1] != layer:
            assert parts[1] in MAY[layer], f"{layer} must not import agentckpt.{parts[1]}"


def test_the_package_and_the_cli_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys, agentckpt\n"
        "from agentckpt.cli.main import main\n"
        f"status = main(['-s', {str(tmp_path / 'none')!r}, 'ls'])\n"
        "assert status == 10, status\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
