"""What a directory holds, as a value that two directories can be compared by."""

from __future__ import annotations

import os
import stat
from typing import Any


def snapshot(root: str | os.PathLike[str], *, times: bool = True) -> dict[bytes, tuple[Any, ...]]:
    """path -> (type, mode, content or target, mtime, names of the same inode)."""
    found: dict[bytes, tuple[Any, ...]] = {}
    inodes: dict[int, list[bytes]] = {}
    base = os.fsencode(root)
    for directory, names, files in os.walk(base):
        for name in [*names, *files]:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            key = os.path.relpath(path, base)
            mtime_ns = info.st_mtime_ns if times else 0
            if stat.S_ISLNK(info.st_mode):
                found[key] = ("l", os.readlink(path), mtime_ns)
            elif stat.S_ISDIR(info.st_mode):
                found[key] = ("d", stat.S_IMODE(info.st_mode), mtime_ns)
            elif stat.S_ISREG(info.st_mode):
                with open(path, "rb") as file:
                    found[key] = ("f", stat.S_IMODE(info.st_mode), file.read(), mtime_ns)
                if info.st_nlink > 1:
                    inodes.setdefault(info.st_ino, []).append(key)
            else:
                found[key] = ("special", stat.S_IFMT(info.st_mode))
    for names_of_one in inodes.values():
        for name in names_of_one:
            found[name] = (*found[name], tuple(sorted(names_of_one)))
    return found
