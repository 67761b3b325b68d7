"""The store: content-addressed packs and one journal. ``FORMAT.md`` says what lies on disk."""

from .pack import PackMark
from .store import Lease, Store, StoreStats
from .view import Draft, Entry, SessionView, View

__all__ = ["Draft", "Entry", "Lease", "PackMark", "SessionView", "Store", "StoreStats", "View"]
