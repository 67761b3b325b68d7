"""The worker on an engine that restores zeros: ``agentckpt demo --break verify-off``."""

from __future__ import annotations

from .breaks import ZeroedEngine
from .worker import main

if __name__ == "__main__":
    raise SystemExit(main(wrap=ZeroedEngine))
