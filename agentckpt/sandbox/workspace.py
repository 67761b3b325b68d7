"""``Workspace``: a plain directory as the sandbox of an agent.

What is captured: regular files, directories (empty ones too), symbolic links, permission bits (set-uid and set-gid dropped from
files), modification times in ns, hard links among captured files. Not captured: owners, access control lists, extended attributes,
FIFOs, sockets, devices, other filesystems mounted inside (these are named in the facts), and processes.

Commands run in their own process group; where the kernel allows it, in their own pid, mount and ipc namespaces and without a network.
When a command ends, everything that it started is killed; when the worker dies, too. They see a clean environment: a fixed PATH, LANG,
``HOME`` and ``PWD`` = the workspace (what a tool leaves in its home belongs to the agent and comes back with it), and what ``env=``
adds. This is no security boundary: a command can write wherever the worker's user can. Run untrusted code in a virtual machine or gVisor.

Invariants:
1. While a capture is not yet written, no command starts and no file is written through this object: they wait for it.
2. A table of what was seen is used only for the reference that it stands for; the next capture names that reference as ``previous``.
3. The displaced tree of a restore is removed only by a capture whose ``previous`` is a later capture of ours: so that one was published.
4. Only ``close`` of a fork removes a workspace, and only its own.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from ..errors import ConflictError, IncompatibleError, NotFoundError, StoreError
from ..types import Consistency, EffectClass, ExecResult, PartRef, PartReport, Ref, Sandbox, Sink, Source, Value
from . import files, linux
from .capture import Totals, TreeWriter
from .commands import isolation, run_command
from .copying import Copier, remove_tree
from .entries import kept_mode
from .ignore import Ignore
from .restore import StagedTree, check_replaceable, discard_displaced, prepare_tree
from .scan import OPEN_DIRECTORY, Seen, changed_since, show
from .tree import Tree, encode_tree

Network = Literal["deny", "declared-harmless", "allow"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NUM_NAMED = 32
_NUM_TABLES = 3


class Workspace:
    """A directory and the commands run in it; implements ``agentckpt.types.Sandbox``. Thread-safe.

    ``path`` is created if it is absent and its parent exists; nothing outside it is. ``network``: ``deny`` runs commands without a
    network where the kernel allows it (then their effect class is ``sandbox``, else ``irreversible``); ``declared-harmless`` gives
    them the network and the class ``sandbox`` on the caller's word; ``allow`` gives them the network and the class ``irreversible``.
    ``ignore``: patterns (see ``ignore.py``) of paths that are neither captured, brought back nor deleted. ``env`` is added to the
    environment of commands. Of each output stream of a command the first and the last half of ``max_output_bytes`` are kept.
    ``wait_s``: how long a command waits for a capture to be written before it gives up.

    Raises ``NotFoundError`` (no parent directory), ``IncompatibleError`` (not a directory, a bad pattern).
    """

    kind = "sandbox"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        network: Network = "deny",
        ignore: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = 1 << 20,
        wait_s: float = 120.0,
    ) -> None:
        self.path = os.path.realpath(path)
        if network not in ("deny", "declared-harmless", "allow"):
            raise IncompatibleError(
                "unknown mode", code="bad-network", object=f"network={network!r}", expected="deny, declared-harmless or allow"
            )
        self.network: Network = network
        self.ignore = Ignore(ignore)
        self.env = dict(env or {})
        self.max_output_bytes = max_output_bytes
        self.wait_s = wait_s
        self.is_fork = False
        self._changed = threading.Condition(threading.RLock())
        self._num_running = 0
        self._open_captures: weakref.WeakSet[_PendingCapture] = weakref.WeakSet()  # a lost one is cancelled
        self._tables: OrderedDict[Ref, Seen] = OrderedDict()
        self._present: Ref | None = None
        self._has_displaced = True  # an earlier process may have left one
        self._after_restore: set[Ref] = set()
        _make_directory(self.path)

    def __repr__(self) -> str:
        return f"Workspace({self.path!r}, network={self.network!r})"

    # --- the part ------------------------------------------------------------------------------------------------

    def capture(self, sink: Sink, previous: Ref | None) -> _PendingCapture:
        """Fix the instant; ``write`` reads. Until it is written (or cancelled) commands and writes through this object wait.

        Raises ``NotFoundError`` if the workspace is gone. ``write`` raises ``StoreError`` (``unreadable``) naming a path.
        """
        with self._changed:
            if not os.path.isdir(self.path):
                raise NotFoundError("the workspace is gone", code="no-workspace", object=self.path)
            published = previous is not None and previous in self._after_restore and self._has_displaced
            pending = _PendingCapture(self, sink, previous, self._num_running > 0, published)
            self._open_captures.add(pending)
            return pending

    def prepare(self, source: Source, ref: Ref) -> _StagedRestore:
        """Verify and build aside, unless the live tree equals the checkpoint. Raises as ``restore.prepare_tree``."""
        with self._exclusive("restore"):
            before = self._tables.get(self._present) if self._present is not None else None
            return _StagedRestore(self, ref, prepare_tree(source, ref, self.path, self.ignore, before))

    def fork(self, n: int) -> list[Workspace]:
        """``n`` copies beside this one (``<path>.fork-<16 hex>``), ignored paths included; extents are shared where the filesystem can.

        Raises ``ConflictError`` while a command runs, ``CapacityError``; then nothing is left behind.
        """
        forks: list[Workspace] = []
        with self._exclusive("fork"):
            try:
                for _ in range(n):
                    forks.append(self._copy())
            except BaseException:
                for fork in forks:
                    fork.close()
                raise
        return forks

    def _copy(self) -> Workspace:
        path = f"{self.path}.fork-{secrets.token_hex(8)}"
        os.mkdir(path, 0o700)
        fork = Workspace(
            path,
            network=self.network,
            ignore=self.ignore.patterns,
            env=self.env,
            max_output_bytes=self.max_output_bytes,
            wait_s=self.wait_s,
        )
        fork.is_fork = True
        source, target = os.open(self.path, OPEN_DIRECTORY), os.open(path, OPEN_DIRECTORY)
        try:
            seen = Copier().root(source, target, self._tables.get(self._present) if self._present is not None else None)
        except BaseException:
            fork.close()
            raise
        finally:
            os.close(source)
            os.close(target)
        if seen is not None and self._present is not None:
            fork._remember(self._present, seen)
        return fork

    def exchange(self, other: Sandbox) -> None:
        """Swap trees with ``other`` in one step; both keep their paths. Raises ``ConflictError`` (a command
        runs, a mount, a working directory).
        """
        if not isinstance(other, Workspace):
            raise IncompatibleError("only a Workspace can be exchanged with one", code="other-backend", object=repr(other)[:200])
        first, second = sorted((self, other), key=lambda item: item.path)
        with first._exclusive("exchange"), second._exclusive("exchange"):
            for workspace in (self, other):
                check_replaceable(workspace.path)
            if not linux.exchange(self.path, other.path):
                aside = f"{self.path}.fork-{secrets.token_hex(8)}"
                os.rename(self.path, aside)
                os.rename(other.path, self.path)
                os.rename(aside, other.path)
            self._tables, other._tables = other._tables, self._tables
            self._present, other._present = other._present, self._present

    def close(self) -> None:
        """Removes the directory of a fork; does nothing to any other workspace. Idempotent."""
        if self.is_fork:
            remove_tree(self.path)

    def contains(self, path: str | os.PathLike[str]) -> bool:
        """Whether ``path`` (which need not exist) is the workspace or lies in it, links resolved."""
        return linux.is_inside(os.path.realpath(path), self.path)

    # --- commands and files ----------------------------------------------------------------------------------------

    @property
    def denies_network(self) -> bool:
        """True if ``network="deny"`` and the kernel was found to allow it (tried once a process)."""
        return self.network == "deny" and isolation().net

    @property
    def effect_class(self) -> EffectClass:
        return "sandbox" if self.denies_network or self.network == "declared-harmless" else "irreversible"

    @property
    def network_claim(self) -> str:
        """What is true of the commands' network, in words, for manifest and report."""
        if self.network == "declared-harmless":
            return "declared, not enforced"
        return "denied" if self.denies_network else "allowed"

    def run(self, command: str | Sequence[str], *, timeout_s: float = 60.0, input: str | None = None) -> ExecResult:
        """Run ``command`` in the workspace: a string with ``/bin/sh -c``, a sequence as it is, never through a shell.

        Returns when the command has ended (or ``timeout_s`` has passed) and everything it started is dead. A program that cannot be
        started gives exit code 127 or 126 and a line on stderr, as in a shell. Raises ``StoreError`` if the command could not be
        launched at all, ``ConflictError`` if a capture is not written within ``wait_s``.
        """
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        if not argv or any("\0" in word for word in argv):
            raise IncompatibleError("is no command", code="bad-command", object=repr(command)[:200])
        found = isolation()
        with self._running():
            fd = os.open(self.path, OPEN_DIRECTORY)
            try:
                return run_command(
                    argv,
                    cwd_fd=fd,
                    env=self._environment(),
                    timeout_s=timeout_s,
                    input=None if input is None else input.encode("utf-8", "surrogateescape"),
                    max_output_bytes=self.max_output_bytes,
                    plan=found if self.network == "deny" else found.without_net(),
                    confine=self.denies_network,
                )
            finally:
                os.close(fd)

    def _environment(self) -> dict[str, str]:
        return {"PATH": PATH, "LANG": "C.UTF-8", "HOME": self.path, "PWD": self.path} | self.env

    def read_file(self, path: str) -> bytes:
        """A regular file's content. Raises ``NotFoundError``, ``IncompatibleError`` (outside, through a link, no regular file)."""
        return files.read_file(self.path, path)

    def write_file(self, path: str, data: bytes | str) -> None:
        """Create or replace a regular file (mode 0644, or what it had); missing parents are made. Raises as ``read_file``."""
        with self._running():
            files.write_file(self.path, path, data.encode() if isinstance(data, str) else data)

    # --- who may do what when ----------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        """While a command runs or a file is written; waits until no capture is open."""
        with self._changed:
            self._wait_for_captures()
            self._num_running += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    @contextmanager
    def _exclusive(self, what: str) -> Iterator[None]:
        """While the tree as a whole is used; refused while a command runs, waits for open captures."""
        with self._changed:
            if self._num_running:
                raise ConflictError(f"a command is running; no {what} now", code="command-running", object=self.path, hint="wait for it")
            self._wait_for_captures()
            yield

    def _wait_for_captures(self) -> None:
        """The caller holds ``_changed``."""
        deadline_s = time.monotonic() + self.wait_s
        while self._open_captures:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise ConflictError(
                    "a capture of this workspace is not written yet", code="capture-open", object=self.path, hint="write or cancel it first"
                )
            self._changed.wait(min(left_s, 0.5))  # a capture that nobody holds any more notifies nobody

    def _remember(self, ref: Ref, seen: Seen) -> None:
        self._tables[ref] = seen
        self._tables.move_to_end(ref)
        self._present = ref
        while len(self._tables) > _NUM_TABLES:
            self._tables.popitem(last=False)


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise IncompatibleError("is not a directory", code="not-a-directory", object=path) from None
    except FileNotFoundError:
        raise NotFoundError("the directory that should hold the workspace does not exist", code="no-parent", object=path) from None
    except OSError as error:
        raise StoreError(f"could not be created: {error.strerror}", code="not-created", object=path) from error


class _PendingCapture:
    """A capture whose instant is fixed: ``agentckpt.types.Pending``."""

    def __init__(self, workspace: Workspace, sink: Sink, previous: Ref | None, disturbed: bool, discard: bool) -> None:
        self._workspace = workspace
        self._sink = sink
        self._previous = previous
        self._disturbed = disturbed
        self._discard = discard
        self._instant_ns = time.time_ns()

    def cancel(self) -> None:
        with self._workspace._changed:
            self._workspace._open_captures.discard(self)
            self._workspace._changed.notify_all()

    def write(self) -> PartRef:
        try:
            return self._write()
        finally:
            self.cancel()

    def _write(self) -> PartRef:
        workspace = self._workspace
        started_s = time.monotonic()
        if self._discard:
            discard_displaced(workspace.path)
            workspace._has_displaced = False
            workspace._after_restore.clear()
        users = linux.holders(workspace.path)
        fd = os.open(workspace.path, OPEN_DIRECTORY)
        try:
            writer = TreeWriter(self._sink, workspace.ignore, self._instant_ns)
            before = workspace._tables.get(self._previous) if self._previous is not None else None
            seen = writer.root(fd, before)
            totals = writer.totals
            late = changed_since(fd, seen, workspace.ignore)
            totals.unstable.update(late)
            _distrust(seen, totals.unstable)
            root = os.fstat(fd)
        except FileNotFoundError as error:
            raise NotFoundError("the workspace is gone", code="no-workspace", object=workspace.path) from error
        finally:
            os.close(fd)
        quiet = not (self._disturbed or users.cwd or users.open or totals.unstable)
        consistency: Consistency = "quiescent" if quiet else "per-file"
        body_facts = {"num_files": totals.num_files, "logical_bytes": totals.logical_bytes, "network": workspace.network_claim}
        tree = Tree(seen.ref, kept_mode(root.st_mode), root.st_mtime_ns, "workspace", consistency, workspace.ignore.patterns, body_facts)
        data = encode_tree(tree)
        ref = self._sink.put("node", data)
        totals.new_bytes += len(data)
        with workspace._changed:
            workspace._remember(ref, seen)
            if workspace._has_displaced:
                workspace._after_restore.add(ref)
        facts = _facts(totals, consistency, workspace.network_claim)
        facts |= {"num_unchecked_processes": users.num_unchecked, "scan_s": time.monotonic() - started_s}
        return PartRef("sandbox", ref, facts)


def _facts(totals: Totals, consistency: str, network: str) -> dict[str, Value]:
    named: list[Value] = [f"{show(path)} ({what})" for path, what in totals.skipped[:_NUM_NAMED]]
    unstable: list[Value] = [show(path) for path in sorted(totals.unstable)[:_NUM_NAMED]]
    return {
        "num_files": totals.num_files, "num_changed": totals.num_changed,
        "logical_bytes": totals.logical_bytes, "new_bytes": totals.new_bytes,
        "num_skipped": len(totals.skipped), "skipped": named, "num_unstable": len(totals.unstable), "unstable": unstable,
        "num_ignored": totals.num_ignored, "consistency": consistency, "network": network,
    }  # fmt: skip


def _distrust(seen: Seen, unstable: set[bytes]) -> None:
    """What changed under the capture is read again by the next one."""
    for path in unstable:
        directory, _, name = path.rpartition(b"/")
        inner = seen.at(directory)
        if inner is not None:
            inner.racy.add(name)


class _StagedRestore:
    """``agentckpt.types.Staged`` for a workspace."""

    def __init__(self, workspace: Workspace, ref: Ref, staged: StagedTree) -> None:
        self._workspace = workspace
        self._ref = ref
        self._staged = staged

    def commit(self) -> PartReport:
        workspace = self._workspace
        with workspace._exclusive("restore"):
            report = self._staged.commit()
            if self._staged.seen is not None:
                workspace._remember(self._ref, self._staged.seen)
            workspace._after_restore = set()
            workspace._has_displaced = True
            return report

    def abort(self) -> None:
        self._staged.abort()
