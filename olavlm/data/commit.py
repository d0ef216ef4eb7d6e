"""Contract 2, the writing side: blocks as Zarr shards (or WebDataset tars), then the commit that makes them exist.

A block's file is laid out here rather than by zarr-python, which replaces other writers' shards, never fsyncs, and
hides the byte ranges the commit must list. The layout is Zarr's own and any Zarr v3 tool opens the array: the images'
chunks back to back, then the ``sharding_indexed`` index of (offset, nbytes) per chunk, then its crc32c. Rows without a
target take no space.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html

On a disk the lease fences every file (`olavlm.data.lease`), so a block that a dead writer left and that is not what
the holder computed is replaced. In an object store nothing can stop a writer that wakes up after a takeover between its
last look at the lease and its write; so there it replaces nothing. A block is created, or is there already: then it is
of this identity, of this tar and undamaged (its notes say so), as good as the holder's own, and the commit lists its
bytes. The commit is created, or was, by a writer that saw the very same blocks. So whichever writer is the last to act,
what a commit lists stays as it was when the commit appeared. (What a second try adds: `olavlm.data.amend`.)
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.data.atomic import Check, publish, replace, sweep
from olavlm.data.codec import Layout
from olavlm.data.corpus import Tar
from olavlm.data.lease import Lease, LeaseLost, leased
from olavlm.data.objects import AnyPath, ObjectPath
from olavlm.data.targets import COMMIT_SCHEMA, TargetSet, TarId, checksum
from olavlm.data.tars import member_name, member_stems, npy_header, pack
from olavlm.errors import OlaError

_ABSENT = 2**64 - 1  # offset and length of a chunk a shard does not have


def tar_blocks(tars: Iterable[Tar], block: int) -> dict[str, range]:
    """Numbers of the blocks of `block` images that every tar has, by its name, in the corpus' order.

    Every tar begins a block of its own. As tars only get appended to a corpus, a number never changes.
    """
    numbers, end = {}, 0
    for tar in tars:
        start, end = end, end + -(-tar.images // block)
        numbers[tar.name] = range(start, end)
    return numbers


def shard(chunks: Sequence[bytes | None]) -> tuple[bytes, list[int]]:
    """A shard object of these chunks (None: absent, reads as zeros), and every chunk's offset in it (-1 if absent)."""
    offsets, position = [-1] * len(chunks), 0
    for i, chunk in enumerate(chunks):
        if chunk is not None:
            offsets[i] = position
            position += len(chunk)
    ranges = {i: (offsets[i], len(chunk)) for i, chunk in enumerate(chunks) if chunk is not None}
    return b"".join([*(chunk for chunk in chunks if chunk is not None), shard_index(len(chunks), ranges)]), offsets


def shard_index(rows: int, ranges: Mapping[int, tuple[int, int]]) -> bytes:
    """What ends a shard of `rows` chunks: (offset, length) of each, absent where `ranges` has none, and a crc32c."""
    index = np.full((rows, 2), _ABSENT, "<u8")
    for row, where in ranges.items():
        index[row] = where
    table = index.tobytes()
    return table + int(google_crc32c.value(table)).to_bytes(4, "little")


def shard_ranges(index: bytes) -> dict[int, tuple[int, int]]:
    """The inverse of `shard_index`.

    Raises:
        ValueError: cut short, or damaged.
    """
    table, crc = index[:-4], index[-4:]
    if len(table) % 16 or int(google_crc32c.value(table)).to_bytes(4, "little") != crc:
        raise ValueError("the index of its chunks is damaged")
    pairs = np.frombuffer(table, "<u8").reshape(-1, 2).tolist()
    return {row: (offset, count) for row, (offset, count) in enumerate(pairs) if offset != _ABSENT}


def describe_arrays(target: TargetSet, rows: int) -> None:
    """Write, mend or enlarge the Zarr metadata so that the arrays have `rows` rows; they never shrink."""
    for file, metadata in _arrays(target, rows).items():
        sweep(file)
        while not _describes(file, metadata):
            with suppress(FileNotFoundError):  # another job swept our temporary file; look again
                replace(file, json.dumps(metadata, indent=2).encode())


def undescribed_arrays(target: TargetSet, rows: int) -> list[AnyPath]:
    """Zarr metadata that are missing, damaged, or of arrays with less rows; `describe_arrays` mends them."""
    return [file for file, metadata in _arrays(target, rows).items() if not _describes(file, metadata)]


def _describes(file: AnyPath, metadata: dict[str, Any]) -> bool:
    """Whether a file says what `metadata` say, of as many rows or more."""
    try:
        found = json.loads(file.read_text())
        return {**found, "shape": 0} == {**metadata, "shape": 0} and found["shape"][0] >= metadata["shape"][0]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _arrays(target: TargetSet, rows: int) -> dict[AnyPath, dict[str, Any]]:
    """The set's Zarr metadata files and what they have to say; none in the WebDataset form."""
    if target.format == "webdataset":
        return {}
    layout = target.identity.layout
    values = _metadata(layout.dtype.name, rows, target.block, layout.shape)
    arrays: dict[AnyPath, dict[str, Any]] = {target.path / "values.zarr" / "zarr.json": values}
    if layout.scales_dtype:
        scales = _metadata(layout.scales_dtype.name, rows, target.block, layout.scales_shape)
        arrays[target.path / "scales.zarr" / "zarr.json"] = scales
    return arrays


def _metadata(data_type: str, rows: int, block: int, shape: tuple[int, ...]) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, *shape],
        "codecs": [{"name": "bytes"} if data_type.endswith("int8") else little],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, *shape],
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [block, *shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0 if data_type.endswith("int8") else 0.0,
        "attributes": {},
    }


def take(target: TargetSet, tar: str, blocks: range) -> Lease | None:
    """The lease of a tar with these blocks; None while somebody else holds it."""
    return take_all(target, {tar: blocks}).get(tar)


def take_all(target: TargetSet, blocks: Mapping[str, range]) -> dict[str, Lease]:
    """The leases of tars with these blocks, of those that nobody else holds.

    Whoever one was taken over from can no longer publish anything: its temporary files are gone. Where there was
    nobody, there are none, and folders of a million files are not searched.
    """
    taken, left = {}, set[AnyPath]()
    with ExitStack() as kept:
        for tar, numbers in blocks.items():
            lease = Lease.acquire(target.path / "leases", tar)
            if lease is not None:
                kept.enter_context(lease.kept())
                taken[tar] = lease
                if lease.inherited:
                    left |= {target.path / "commits" / f"{tar}.parquet", *block_files(target, numbers)}
        sweep(*left)
    return taken


def block_files(target: TargetSet, blocks: range) -> set[AnyPath]:
    """The files that blocks of a set lie in, were they all there."""
    return {file for block in blocks for file in (target.values_file(block), target.scales_file(block))}


def tidy(target: TargetSet, tars: Iterable[Tar]) -> None:
    """Remove what writers left behind that died, when nobody will open their tar again.

    Args:
        target: the set.
        tars: all of the corpus.
    """
    if names := leased(target.path / "leases"):
        numbers = tar_blocks(tars, target.block)
        for lease in take_all(target, {name: numbers[name] for name in names if name in numbers}).values():
            lease.release()


class TarWriter:
    """Writes one tar's targets of one set, in the order of the corpus index, holding at most one block in memory.

    A context manager: leaving it gives up the lease that fences every file the writer lets appear.
    """

    def __init__(self, target: TargetSet, tar: TarId, blocks: range, lease: Lease):
        self._target, self._tar, self._lease = target, tar, lease
        self._blocks, self._block = blocks, blocks.start
        self._values: list[bytes | None] = []
        self._scales: list[bytes | None] = []
        self._pending: list[dict[str, Any]] = []  # rows of the block being filled
        self._rows: list[dict[str, Any]] = []

    @classmethod
    def open(cls, target: TargetSet, tar: TarId, blocks: range) -> "TarWriter | None":
        """A writer for the tar; None if it is committed, or if somebody else is at it.

        Args:
            target: the set.
            tar: the tar.
            blocks: its blocks, from `tar_blocks`.

        Raises:
            OlaError: it was committed when it had another content.
        """
        lease = take(target, tar.name, blocks)
        if lease is None:
            return None
        file = target.commit_file(tar)
        with lease.kept():
            committed = file.exists()
        if not committed:
            return cls(target, tar, blocks, lease)
        lease.release()
        if target.commit(tar) is None:
            raise OlaError(
                f"{file}: this tar was committed when its content was another than the corpus now says ({tar.hash}); "
                "a changed tar needs a corpus and a store of its own"
            )
        return None

    def __enter__(self) -> "TarWriter":
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
        """Append an image's encoded target: values and scales (or None), as from `codec.encode`."""
        value_bytes, scale_bytes = target_bytes(self._target, key, values, scales)
        row = self._row(key, image_index, image_hash, "ok", None)
        self._append(row | ok_row(key, value_bytes, scale_bytes, rms, absmax), value_bytes, scale_bytes)

    def fail(self, key: str, image_index: int, image_hash: str | None, reason: str) -> None:
        """Append an image that has no target, and why. It keeps its row, empty."""
        self._append(self._row(key, image_index, image_hash, "failed", reason), None, None)

    def no_image(self, key: str) -> None:
        """Append a text-only sample; it takes no row."""
        self._pending.append(self._row(key, -1, None, "no_image", None))

    def commit(self) -> None:
        """Publish the last block, then the commit.

        Raises:
            LeaseLost: another writer has the tar now.
        """
        if self._values:
            self._publish_block()
        self._rows += self._pending
        file, data = self._target.commit_file(self._tar), commit_bytes(self._target, self._tar, self._rows)
        try:
            fenced(self._lease, publish, file, data)
        except FileExistsError:  # by a writer whose lease was taken; only an object store lets it
            if file.read_bytes() != data:
                raise LeaseLost(f"{file}: committed by another writer") from None

    def _row(
        self, key: str, image_index: int, image_hash: str | None, status: str, reason: str | None
    ) -> dict[str, Any]:
        """A row without a target (yet)."""
        row = dict.fromkeys(("block", "row", "values_offset", "values_bytes", "scales_offset", "scales_bytes"), -1)
        named = {"key": key, "image_index": image_index, "image_hash": image_hash, "status": status, "reason": reason}
        return {**named, **row, "checksum": 0, "rms": 0.0, "absmax": 0.0}

    def _append(self, row: dict[str, Any], values: bytes | None, scales: bytes | None) -> None:
        if len(self._values) == self._target.block:
            self._publish_block(row["key"])
        if self._block not in self._blocks:  # the next block is another tar's
            raise OlaError(
                f"tar {self._tar.name}: its index has more images than tars.parquet says; make the corpus anew, "
                "in another folder"
            )
        row |= {"block": self._block, "row": len(self._values)}
        self._pending.append(row)
        self._values.append(values)
        self._scales.append(scales)

    def _publish_block(self, following: str | None = None) -> None:
        """Publish the block that is filled; `following` is the key of the row after it."""
        stored = [row for row in self._pending if row["status"] == "ok"]
        chunks = {"values": self._values, "scales": self._scales}
        for file, data, offsets in self._objects(following):
            for name, of_name in offsets.items():
                for row in stored:
                    row[f"{name}_offset"] = of_name[row["row"]]
            ranges = {name: [(row[f"{name}_offset"], row[f"{name}_bytes"]) for row in stored] for name in offsets}
            there = self._publish(file, data, [place for places in ranges.values() for place in places])
            for name, places in ranges.items() if there != data else ():
                for row, (start, count) in zip(stored, places, strict=True):
                    chunks[name][row["row"]] = there[start : start + count]
                    row["checksum"] = checksum(
                        row["key"], self._scales[row["row"]] or b"", self._values[row["row"]] or b""
                    )
        self._rows += self._pending
        self._pending, self._values, self._scales = [], [], []
        self._block += 1

    def _objects(self, following: str | None) -> list[tuple[AnyPath, bytes, dict[str, list[int]]]]:
        """The block's files: where each goes, its content, and in it the offsets of every row's values or scales."""
        layout, padding = self._target.identity.layout, [None] * (self._target.block - len(self._values))
        arrays: list[tuple[str, list[bytes | None], np.dtype[Any], tuple[int, ...]]] = [
            ("values", self._values, layout.dtype, layout.shape)
        ]
        if layout.scales_dtype:
            arrays.append(("scales", self._scales, layout.scales_dtype, layout.scales_shape))
        if self._target.format == "zarr":
            files = {"values": self._target.values_file, "scales": self._target.scales_file}
            shards = [(name, shard([*chunks, *padding])) for name, chunks, _, _ in arrays]
            return [(files[name](self._block), data, {name: of_rows}) for name, (data, of_rows) in shards]
        members, places = [], []
        for row, stem in zip(self._pending, member_stems(self._pending, following), strict=True):
            for name, chunks, dtype, shape in arrays if row["status"] == "ok" else ():
                members.append((member_name(stem, name), npy_header(dtype, shape), chunks[row["row"]] or b""))
                places.append((name, row["row"]))
        data, starts = pack(members)
        offsets = {name: [-1] * len(self._values) for name, *_ in arrays}
        for (name, number), start in zip(places, starts, strict=True):
            offsets[name][number] = start
        return [(self._target.values_file(self._block), data, offsets)]

    def _publish(self, file: AnyPath, data: bytes, ranges: list[tuple[int, int]]) -> bytes:
        """A block's file under its final name; returns what lies there then.

        What a dead writer left there uncommitted is kept if equal. If not, it is replaced on a disk, and taken as it is
        in an object store (see the module).

        Args:
            file: its name.
            data: its content.
            ranges: offset and length of the chunks in it; what is between them does not depend on their values.

        Raises:
            OlaError: what is there, in an object store, is damaged, of another content of the tar, or lacks other
                images.
        """
        try:
            if isinstance(file, ObjectPath):
                self._lease.check()
                file.create(data, block_notes(self._tar, data))
            else:
                fenced(self._lease, publish, file, data)
        except FileExistsError:
            if not isinstance(file, ObjectPath):
                if file.read_bytes() != data:
                    fenced(self._lease, replace, file, data)
                return data
            there, notes, _ = file.read()
            same = block_notes(self._tar, there).items() <= notes.items() and len(there) == len(data)
            if there != data and not (same and _between(there, ranges) == _between(data, ranges)):
                self._lease.check()  # whoever took over may have gone on, and added to this block
                raise OlaError(
                    f"{file}: left here uncommitted, damaged or by a writer that found other images in tar "
                    f"{self._tar.name}; `python -m featurize repair` removes it"
                ) from None
            return there
        return data


def block_notes(tar: TarId, data: bytes) -> dict[str, str]:
    """What is noted beside a block in an object store: whose it is, and whether it is what was written."""
    return {"tar-hash": tar.hash, "crc32c": f"{google_crc32c.value(data):08x}"}


def commit_bytes(target: TargetSet, tar: TarId, rows: Sequence[dict[str, Any]]) -> bytes:
    """The content of a tar's commit file: its rows (`COMMIT_SCHEMA`), and what they are of."""
    metadata = {"tar": tar.name, "tar_hash": tar.hash, "digest": target.identity.digest}
    table = pa.Table.from_pylist(rows, COMMIT_SCHEMA).replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def ok_row(key: str, values: bytes, scales: bytes, rms: float, absmax: float) -> dict[str, Any]:
    """What a commit's row says of a target apart from where it is."""
    sizes = {"values_bytes": len(values), "scales_bytes": len(scales), "checksum": checksum(key, scales, values)}
    return {"status": "ok", "reason": None, **sizes, "rms": rms, "absmax": absmax}


def target_bytes(
    target: TargetSet, key: str, values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any] | None
) -> tuple[bytes, bytes]:
    """A target's chunks, after a check that they fit the set."""
    of_scales = () if scales is None else (scales.dtype, scales.shape)
    found = Layout(values.dtype, values.shape, *of_scales)
    if found != target.identity.layout:
        raise ValueError(f"{key}: {found} does not fit {target.identity}")
    return values.tobytes(), b"" if scales is None else scales.tobytes()


def fenced(lease: Lease, write: Callable[[AnyPath, bytes, Check], None], file: AnyPath, data: bytes) -> None:
    """`publish` or `replace` that a writer whose lease was taken cannot complete.

    Raises:
        LeaseLost: another writer has the tar now.
    """
    try:
        write(file, data, lease.check)
    except FileNotFoundError:  # our temporary file was swept, which only a successor does
        lease.check()
        raise


def _between(data: bytes, ranges: list[tuple[int, int]]) -> list[bytes]:
    """What is left of `data` without these ranges."""
    ordered = sorted(ranges)
    starts = [0, *(start + count for start, count in ordered)]
    ends = [*(start for start, _ in ordered), len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]
