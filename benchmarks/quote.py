"""The README's table of figures, made from the committed result: ``python -m benchmarks.quote`` rewrites it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def table(found: dict[str, Any]) -> str:
    """Markdown: one line a row, and what it was measured on."""
    machine = found["machine"]
    lines = [
        f"Measured on {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']} with one thread, at commit `{found['commit']}`"
        " (`python -m benchmarks demo`):",
        "",
        "| figure | ours | beside it, in the same run | goal |",
        "| --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        beside = "" if row["other"] is None else f"{row['against']}: {number(row['other'])} {row['unit']}, ratio {number(row['ratio'])}"
        goal = "" if row["goal"] is None else f"{number(row['goal'])}: {'met' if row['met'] else 'not met'}"
        lines.append(f"| {row['metric']} | {number(row['ours'])} {row['unit']} | {beside} | {goal} |")
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def replaced(text: str, found: dict[str, Any]) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), json.loads(RESULT.read_text())))
