"""``python -m benchmarks NAME [--quick] [--json]``: measure beside a peer and a ceiling, in one run."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from .report import document, print_table

NAMES = {
    "turns": "pause of a capture, token gaps beside it, time between last token and tool",
    "metadata": "what a turn writes beside its chunks, at 1k to 1M tokens of history",
    "kv_restore": "restore of synthetic KV beside read, hash and copy",
    "demo": "what a turn, a capture and a restore of the included engine cost",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(NAMES), help="; ".join(f"{k}: {v}" for k, v in NAMES.items()))
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    rows = importlib.import_module(f".{args.name}", __package__).run(quick=args.quick)
    found = document(args.name, rows, quick=args.quick)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print_table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
