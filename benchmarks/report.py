"""The one shape of a result, and how it is printed."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``ratio`` is ours/other. ``goal`` bounds the ratio (or ours, where there is no other): ``best`` says which way."""

    metric: str
    unit: str
    ours: float
    against: str = ""
    other: float | None = None
    goal: float | None = None
    best: str = "high"

    @property
    def ratio(self) -> float | None:
        return self.ours / self.other if self.other else None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        value = self.ratio if self.other is not None else self.ours
        return value is not None and (value >= self.goal if self.best == "high" else value <= self.goal)


def document(name: str, rows: list[Row], *, quick: bool) -> dict[str, Any]:
    return {
        "benchmark": name,
        "quick": quick,
        "commit": commit(),
        "machine": machine(),
        "rows": [
            {
                "metric": r.metric,
                "unit": r.unit,
                "ours": r.ours,
                "against": r.against,
                "other": r.other,
                "ratio": r.ratio,
                "goal": r.goal,
                "met": r.met,
            }
            for r in rows
        ],
    }


def commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "../agentckpt", "../benchmarks/*.py"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    return (done.stdout.strip() or "unknown") + ("-dirty" if dirty else "")


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    try:
        import torch

        torch_version, threads = torch.__version__, torch.get_num_threads()
    except ImportError:
        torch_version, threads = "none", 0
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": sys.version.split()[0],
        "torch": torch_version,
        "torch_threads": threads,
        "kernel": platform.release(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def print_table(found: dict[str, Any]) -> None:
    m = found["machine"]
    print(f"{found['benchmark']} at {found['commit']} on {m['cpu']} x{m['cores']}, torch {m['torch']}, load {m['load'][0]}")
    for row in found["rows"]:
        other = "" if row["other"] is None else f"{row['against']} {row['other']:.4g}, ratio {row['ratio']:.3g}"
        goal = "" if row["goal"] is None else f"goal {row['goal']:g} {'met' if row['met'] else 'NOT met'}"
        print(f"  {row['metric']:<62} {row['ours']:>12.4g} {row['unit']:<8} {other:<44} {goal}")
