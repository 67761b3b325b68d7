"""Sandboxes: where an agent's tools run, and whose files are part of the checkpoint.

``workspace.py`` first; then ``capture.py`` and ``restore.py``; ``entries.py``, ``dirs.py``, ``content.py`` hold the format;
``launcher.py`` the commands.
"""

from .dirs import Budget
from .entries import Entry
from .tree import Change, Plan, Tree, plan_tree, read_path, read_tree, restore_tree, tree_diff, walk_tree
from .workspace import Network, Workspace

__all__ = [
    "Budget",
    "Change",
    "Entry",
    "Network",
    "Plan",
    "Tree",
    "Workspace",
    "plan_tree",
    "read_path",
    "read_tree",
    "restore_tree",
    "tree_diff",
    "walk_tree",
]
