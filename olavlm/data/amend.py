"""Contract 2, a second try: targets of images that were committed as failed, added to what is there.

Every chunk that a commit lists stays at its offset: new chunks are appended behind (in front of a shard's new index, or
as a tar's last members), then the commit is replaced. So whoever holds the old commit goes on reading right bytes,
before, while and after; it is kept in ``superseded/``, where a training run that is pinned to it finds it again.

On a disk the lease fences every file, and a chunk that no commit lists, which a killed try left, goes. In an object
store, where a writer may wake up late, a block or a commit is only ever replaced in the version that was read
(``If-Match``), and no chunk ever goes: one that another try left for an image is taken as it is, if the block's notes
say that it is undamaged. So of two tries at one tar the slower one changes nothing that the faster has listed,
whichever of them that is.
"""

from contextlib import suppress
from itertools import accumulate
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np

from olavlm.data.atomic import publish, replace, sweep
from olavlm.data.commit import (
    block_notes,
    commit_bytes,
    fenced,
    ok_row,
    shard_index,
    shard_ranges,
    take,
    target_bytes,
)
from olavlm.data.corpus import content_hash
from olavlm.data.lease import Lease, LeaseLost
from olavlm.data.objects import AnyPath, Content, ObjectPath
from olavlm.data.targets import TargetSet, TarId, checksum
from olavlm.data.tars import content_ranges, member_name, member_stems, npy_header, pack
from olavlm.errors import OlaError

Chunk = tuple[int, str]  # row in its block; "values" or "scales"
Ranges = dict[Chunk, tuple[int, int]]  # offset and length in the block's file


class TarAmender:
    """Tries one committed tar's failed images again; takes what a `TarWriter` takes, in the order of the corpus index.

    It holds at most one block in memory. A context manager: leaving it gives up the lease. Where nothing succeeds,
    nothing is written.

    Attributes:
        failed: positions in the commit, which are those in the corpus index, of the images to try.
    """

    def __init__(self, target: TargetSet, tar: TarId, rows: list[dict[str, Any]], lease: Lease, commit: Content):
        self._target, self._tar, self._rows, self._lease = target, tar, rows, lease
        self._commit = commit  # that is to be superseded
        self._places = {(row["key"], row["image_index"]): i for i, row in enumerate(rows) if row["status"] == "failed"}
        self.failed = frozenset(self._places.values())
        self._stems = {
            (row["block"], row["row"]): stem for row, stem in zip(rows, member_stems(rows, None), strict=True)
        }
        self._block = -1
        self._chunks: dict[Chunk, bytes] = {}  # of the block being filled
        self._changed = False

    @classmethod
    def open(cls, target: TargetSet, tar: TarId, blocks: range) -> "TarAmender | None":
        """An amender for the tar; None if it is not committed, has no failed image, or if somebody else is at it.

        Arguments as of `TarWriter.open`.
        """
        lease = take(target, tar.name, blocks)
        if lease is None:
            return None
        with lease.kept():
            content = _read(target.commit_file(tar))
            commit = target.commit(tar, content_hash(content.data)) if content.data else None
            amender = cls(target, tar, [] if commit is None else commit.to_pylist(), lease, content)
        if amender.failed:
            return amender
        lease.release()
        return None

    def __enter__(self) -> "TarAmender":
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.release()

    def add(
        self,
        key: str,
        image_index: int,
        image_hash: str,
        values: np.ndarray[Any, Any],
        scales: np.ndarray[Any, Any] | None,
        rms: float,
        absmax: float,
    ) -> None:
        """The target an image has now; arguments as of `TarWriter.add`."""
        row = self._rows[self._places[key, image_index]]
        if row["image_hash"] != image_hash:
            raise OlaError(
                f"{self._target.commit_file(self._tar)}: sample {key!r}, image {image_index} has hash "
                f"{row['image_hash']} in the commit and {image_hash} in the corpus; `python -m featurize repair`"
            )
        if row["block"] != self._block:
            self._publish_block()
            self._block = row["block"]
        value_bytes, scale_bytes = target_bytes(self._target, key, values, scales)
        row |= ok_row(key, value_bytes, scale_bytes, rms, absmax)
        self._chunks[row["row"], "values"] = value_bytes
        if scales is not None:
            self._chunks[row["row"], "scales"] = scale_bytes
        self._changed = True

    def fail(self, key: str, image_index: int, image_hash: str | None, reason: str) -> None:
        """The image failed again; the commit says why it did now, if it is replaced at all."""
        self._rows[self._places[key, image_index]]["reason"] = reason

    def commit(self) -> None:
        """Publish the last block, then the new commit; nothing if every image failed again.

        Raises:
            LeaseLost: another writer has the tar now.
        """
        if not self._changed:
            return
        self._publish_block()
        kept = self._target.superseded_file(self._tar, content_hash(self._commit.data))
        sweep(kept)
        with suppress(FileExistsError):  # by a try that was killed before it replaced the commit
            fenced(self._lease, publish, kept, self._commit.data)
        data = commit_bytes(self._target, self._tar, self._rows)
        self._replace(self._target.commit_file(self._tar), data, self._commit.version)

    def _publish_block(self) -> None:
        if not self._chunks:
            return
        if self._target.format == "webdataset":
            self._append(self._target.values_file(self._block), self._chunks)
        else:
            for name, file in (("values", self._target.values_file), ("scales", self._target.scales_file)):
                if chunks := {chunk: data for chunk, data in self._chunks.items() if chunk[1] == name}:
                    self._append(file(self._block), chunks)
        self._chunks = {}

    def _append(self, file: AnyPath, chunks: dict[Chunk, bytes]) -> None:
        """Append chunks to a block's file, and say in their rows where they are and what they hold."""
        names = {name for _, name in chunks}
        rows = {row["row"]: row for row in self._rows if row["block"] == self._block}
        listed: Ranges = {
            (number, name): (row[f"{name}_offset"], row[f"{name}_bytes"])
            for number, row in rows.items()
            for name in names
            if row[f"{name}_offset"] >= 0
        }
        end = max((sum(place) for place in listed.values()), default=0)
        data, notes, version = _read(file)
        if len(data) < end:
            raise OlaError(f"{file}: cut short, {len(data)} of {end} bytes; run `python -m featurize repair` first")
        there = listed
        if isinstance(file, ObjectPath) and data:
            found, end = self._found(file, data, chunks)
            if block_notes(self._tar, data).items() <= notes.items():
                there = found | listed
        if added := {chunk: content for chunk, content in chunks.items() if chunk not in there}:
            data, places = self._extended(data[:end], added)
            there = there | places
            if self._target.format == "zarr":
                data += shard_index(self._target.block, {number: place for (number, _), place in there.items()})
            self._replace(file, data, version, block_notes(self._tar, data))
        for number, name in chunks:
            offset, count = there[number, name]
            rows[number][f"{name}_offset"] = offset
            self._chunks[number, name] = data[offset : offset + count]
        for number in {number for number, _ in chunks}:
            values, scales = (self._chunks.get((number, name), b"") for name in ("values", "scales"))
            rows[number]["checksum"] = checksum(rows[number]["key"], scales, values)

    def _found(self, file: AnyPath, data: bytes, chunks: dict[Chunk, bytes]) -> tuple[Ranges, int]:
        """Where chunks lie in a block's file, listed or not (of a tar, only these), and where the last one ends."""
        try:
            if self._target.format == "webdataset":
                found, end = content_ranges(data)
                members = [(chunk, self._member(chunk), len(content)) for chunk, content in chunks.items()]
                # An array's bytes are the last ones of its member.
                return {c: (sum(found[name]) - count, count) for c, name, count in members if name in found}, end
            end = len(data) - len(shard_index(self._target.block, {}))
            (name,) = {name for _, name in chunks}
            return {(number, name): place for number, place in shard_ranges(data[end:]).items()}, end
        except ValueError as error:
            raise OlaError(f"{file}: {error}; run `python -m featurize repair` first") from None

    def _extended(self, data: bytes, added: dict[Chunk, bytes]) -> tuple[bytes, Ranges]:
        """A block's file up to its last chunk with more chunks behind it, and where these are."""
        if self._target.format == "webdataset":
            data += bytes(-len(data) % BLOCKSIZE)
            more, starts = pack([(self._member(chunk), self._head(chunk), added[chunk]) for chunk in added])
        else:
            more, starts = b"".join(added.values()), list(accumulate(map(len, added.values()), initial=0))[:-1]
        places = {chunk: (len(data) + start, len(added[chunk])) for chunk, start in zip(added, starts, strict=True)}
        return data + more, places

    def _member(self, chunk: Chunk) -> str:
        """The name of a chunk's member in its tar."""
        return member_name(self._stems[self._block, chunk[0]], chunk[1])

    def _head(self, chunk: Chunk) -> bytes:
        """What precedes the chunk in its member."""
        layout = self._target.identity.layout
        if chunk[1] == "values" or layout.scales_dtype is None:
            return npy_header(layout.dtype, layout.shape)
        return npy_header(layout.scales_dtype, layout.scales_shape)

    def _replace(self, file: AnyPath, data: bytes, version: str, notes: dict[str, str] | None = None) -> None:
        """Set the content of a file or, if nobody was faster, of this version of an object ("": there was none)."""
        if not isinstance(file, ObjectPath):
            fenced(self._lease, replace, file, data)
            return
        self._lease.check()
        try:
            if version:
                file.update(data, version, notes)
            else:
                file.create(data, notes)
        except (FileExistsError, FileNotFoundError):
            raise LeaseLost(f"{file}: written by another writer") from None


def _read(file: AnyPath) -> Content:
    """An object, or as much of that as a file has; empty if it is not there."""
    try:
        return file.read() if isinstance(file, ObjectPath) else Content(file.read_bytes(), {}, "")
    except FileNotFoundError:
        return Content(b"", {}, "")
