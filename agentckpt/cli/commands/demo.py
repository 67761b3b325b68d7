"""``demo``: the arguments and the run live in ``agentckpt.demo``."""

from __future__ import annotations

import argparse
from typing import Any

from ..render import Screen


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    from ...demo.run import add_arguments

    add_arguments(parser)


def run(name: str, args: argparse.Namespace) -> Any:
    from ...demo.run import run as run_demo

    return run_demo(args)


def render(name: str, result: Any, screen: Screen) -> None:
    from ...demo.render import render as render_demo

    render_demo(result, screen)
