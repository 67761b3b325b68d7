"""Reading objects: from memory, from the known place, from wherever else a copy is. The store's ``Source``.

Invariants:
1. Nothing is returned whose hash was not compared with its reference; no length is trusted before it was bounded.
2. A record above the last commit marker of a pack may be torn: if it does not fit its hash it is absent, not corrupt.
3. A place that turns out to be wrong costs a scan, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from ..errors import AgentckptError, CorruptionError, NotFoundError
from ..types import Buffer, Ref
from .catalog import Catalog
from .failures import io_errors
from .ids import IdKeys, check_ref, show_ref
from .io import IO
from .pack import PackFiles, Waiting
from .record import CODEC_RAW, HEADER_BYTES, MAX_PLAIN_BYTES, Location, decode_header, refuse_unknown, unsqueeze

T = TypeVar("T")
ATTEMPTS: Final = 3
"""how often a pack may be renamed or removed under a reader's feet"""


class Memory(Protocol):
    """What this process wrote and the index does not hold yet."""

    def waiting(self, ref: Ref) -> Waiting | None:
        """An object that is not durable."""
        ...

    def recent(self, ref: Ref) -> Location | None:
        """The place of one that is durable and not indexed."""
        ...

    def index_now(self) -> None: ...


class Reader:
    """Thread-safe."""

    def __init__(self, io: IO, root: str, keys: IdKeys, catalog: Catalog, files: PackFiles, memory: Memory) -> None:
        self._io, self._root, self._keys = io, root, keys
        self._catalog, self._files, self._memory = catalog, files, memory
        self.damaged: set[Ref] = set()
        """found damaged, with no sound copy: the next ``put`` writes them again"""
        self.last_look_s = 0.0

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        """See ``types.Source``."""
        ref = check_ref(ref)
        waiting = self._memory.waiting(ref)
        if waiting is not None:
            _check_length(ref, waiting.plain_bytes, max_bytes)
            return unsqueeze(bytes(waiting.stored), waiting.codec, waiting.plain_bytes)

        def read(at: Location) -> bytes:
            _check_length(ref, at.plain_bytes, max_bytes)
            with self._files.open(at.pack) as file:
                plain = unsqueeze(file.pread(at.offset + HEADER_BYTES, at.stored_bytes), at.codec, at.plain_bytes)
            self._verify(ref, plain)
            return plain

        return self._read(ref, read)

    def read_into(self, ref: Ref, target: memoryview) -> None:
        """See ``types.Source``."""
        ref = check_ref(ref)
        view = target.cast("B") if target.format != "B" or target.ndim != 1 else target
        waiting = self._memory.waiting(ref)
        if waiting is not None:
            _check_exact(ref, waiting.plain_bytes, len(view))
            view[:] = unsqueeze(bytes(waiting.stored), waiting.codec, waiting.plain_bytes)
            return

        def read(at: Location) -> None:
            _check_exact(ref, at.plain_bytes, len(view))
            with self._files.open(at.pack) as file:
                if at.codec == CODEC_RAW and at.stored_bytes == len(view):
                    if file.pread_into(at.offset + HEADER_BYTES, view) != len(view):
                        raise CorruptionError("its pack ends before it", object=show_ref(ref), code="corrupt")
                else:
                    view[:] = unsqueeze(file.pread(at.offset + HEADER_BYTES, at.stored_bytes), at.codec, at.plain_bytes)
            self._verify(ref, view)

        self._read(ref, read)

    def place(self, ref: Ref) -> Location | None:
        """Where a durable object, or one in another pack's tail, would be read."""
        return self._memory.recent(ref) or self._catalog.find(ref)

    def look_again(self) -> bool:
        """See what other processes wrote; True if there was anything."""
        self.last_look_s = self._io.now()
        return self._catalog.refresh()

    def _read(self, ref: Ref, read: Callable[[Location], T]) -> T:
        """Try the known place, then what a look at the disk shows, then every copy there is."""
        with io_errors(f"{self._root}/packs"):
            for attempt in range(1, ATTEMPTS + 1):
                at = self._known_place(ref)
                tail = self._catalog.is_tail(ref, at)
                try:
                    return read(at)
                except FileNotFoundError:  # sealed or pruned since
                    self._files.forget(at.pack)
                    if attempt < ATTEMPTS:
                        self.look_again()
                        continue
                    failure: AgentckptError = _absent(ref)
                except CorruptionError as error:
                    if error.code in ("too-long", "wrong-length") and self._names(at, ref):
                        raise
                    failure = _absent(ref) if tail else self._explain(ref, at, error)
                break
            return self._read_elsewhere(ref, read, at, failure)

    def _read_elsewhere(self, ref: Ref, read: Callable[[Location], T], tried: Location, failure: AgentckptError) -> T:
        """The place was wrong or damaged: make the index new if it lied, then try all copies."""
        if not self._names(tried, ref):
            self._memory.index_now()
            self._catalog.rebuild()
        for at, is_durable in self._catalog.all_places(ref):
            if at != tried:
                try:
                    found = read(at)
                except (CorruptionError, FileNotFoundError):
                    continue
                if is_durable:
                    self._catalog.added(at.pack, [(ref, at)], 0)
                return found
        if isinstance(failure, CorruptionError):
            self.damaged.add(ref)
        raise failure

    def _known_place(self, ref: Ref) -> Location:
        at = self.place(ref) or (self.place(ref) if self.look_again() else None)
        if at is None:
            raise _absent(ref)
        return at

    def _names(self, at: Location, ref: Ref) -> bool:
        """True if the record header at this place is that of ``ref``: the index did not lie."""
        try:
            with self._files.open(at.pack) as file:
                header = decode_header(file.pread(at.offset, HEADER_BYTES))
        except FileNotFoundError:
            return False
        return header is not None and header.ref == ref

    def _verify(self, ref: Ref, plain: Buffer) -> None:
        if not self._keys.matches(ref, plain):
            raise CorruptionError("its bytes do not match its id", object=show_ref(ref), code="hash-mismatch")

    def _explain(self, ref: Ref, at: Location, error: CorruptionError) -> CorruptionError:
        """A record that this version must refuse also fails its hash: say so rather than calling it damaged."""
        with self._files.open(at.pack) as file:
            header = decode_header(file.pread(at.offset, HEADER_BYTES))
        if header is not None:
            refuse_unknown(header, f"{show_ref(ref)} in {at.pack}")
        hint = "`agentckpt verify --data` lists what it touches"
        return CorruptionError(error.message, object=f"pack {at.pack} at {at.offset}", code=error.code, hint=hint)


def _absent(ref: Ref) -> NotFoundError:
    return NotFoundError("is not in the store", object=show_ref(ref), code="no-object")


def _check_length(ref: Ref, plain_bytes: int, max_bytes: int) -> None:
    if plain_bytes > min(max_bytes, MAX_PLAIN_BYTES):
        raise CorruptionError(
            "is longer than it may be", object=show_ref(ref), expected=f"at most {max_bytes} bytes", found=str(plain_bytes), code="too-long"
        )


def _check_exact(ref: Ref, plain_bytes: int, length: int) -> None:
    if plain_bytes != length:
        raise CorruptionError(
            "has another length", object=show_ref(ref), expected=f"{length} bytes", found=str(plain_bytes), code="wrong-length"
        )
