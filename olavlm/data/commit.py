"""Contract 2, the writing side: blocks as Zarr shards, then the commit that makes them exist.

A block's file is laid out here rather than by zarr-python, which replaces other writers' shards, never fsyncs, and
hides the byte ranges the commit must list. The layout is Zarr's own and any Zarr v3 tool opens the array: the images'
chunks back to back, then the ``sharding_indexed`` index of (offset, nbytes) per chunk, then its crc32c. Rows without a
target take no space.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olavlm.data.atomic import Check, publish, replace, sweep
from olavlm.data.codec import Layout
from olavlm.data.lease import Lease
from olavlm.data.targets import COMMIT_SCHEMA, TargetSet, TarId, checksum
from olavlm.errors import OlaError

_ABSENT = 2**64 - 1  # offset and length of a chunk a shard does not have


def blocks(images: int, block: int) -> int:
    """Shards of a tar with that many images."""
    return -(-images // block)


def first_blocks(images: Sequence[int], block: int) -> list[int]:
    """Number of each tar's first block, from the tars' image counts in the corpus' order (tars only get appended)."""
    starts = np.cumsum([0, *(blocks(n, block) for n in images)])
    return [int(start) for start in starts[:-1]]


def shard(chunks: Sequence[bytes | None]) -> tuple[bytes, list[int]]:
    """A shard object of these chunks (None: absent, reads as zeros), and every chunk's offset in it (-1 if absent)."""
    index = np.full((len(chunks), 2), _ABSENT, "<u8")
    offsets, position = [-1] * len(chunks), 0
    for i, chunk in enumerate(chunks):
        if chunk is not None:
            index[i] = position, len(chunk)
            offsets[i] = position
            position += len(chunk)
    table = index.tobytes()
    crc = int(google_crc32c.value(table)).to_bytes(4, "little")
    return b"".join([*(chunk for chunk in chunks if chunk is not None), table, crc]), offsets


def describe_arrays(target: TargetSet, rows: int) -> None:
    """Write or enlarge the Zarr metadata so that the arrays have `rows` rows; they never shrink."""
    layout = target.identity.layout
    _describe(target.path / "values.zarr" / "zarr.json", layout.dtype.name, rows, target.block, layout.shape)
    if layout.scales_dtype:
        name = layout.scales_dtype.name
        _describe(target.path / "scales.zarr" / "zarr.json", name, rows, target.block, layout.scales_shape)


def _describe(file: Path, data_type: str, rows: int, block: int, shape: tuple[int, ...]) -> None:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, *shape],
        "codecs": [{"name": "bytes"} if data_type.endswith("int8") else little],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    metadata = {
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
    sweep(file)
    while not (file.exists() and json.loads(file.read_text())["shape"][0] >= rows):
        with suppress(FileNotFoundError):  # another job swept our temporary file; look again
            replace(file, json.dumps(metadata, indent=2).encode())


def tidy(target: TargetSet) -> None:
    """Remove what writers left that died right after a commit, when nobody will open their tar again."""
    for name in {path.name.rpartition(".")[0] for path in (target.path / "leases").glob("[!.]*.*")}:
        lease = Lease.acquire(target.path / "leases", name)
        if lease is not None:
            sweep(target.path / "commits" / f"{name}.parquet")
            lease.release()


class TarWriter:
    """Writes one tar's targets of one set, in the order of the corpus index, holding at most one block in memory.

    A context manager: leaving it gives up the lease that fences every file the writer lets appear.
    """

    def __init__(self, target: TargetSet, tar: TarId, first_block: int, lease: Lease):
        self._target, self._tar, self._lease = target, tar, lease
        self._block = first_block
        self._values: list[bytes | None] = []
        self._scales: list[bytes | None] = []
        self._pending: list[dict[str, Any]] = []  # rows of the block being filled
        self._rows: list[dict[str, Any]] = []

    @classmethod
    def open(cls, target: TargetSet, tar: TarId, first_block: int) -> "TarWriter | None":
        """A writer for the tar; None if it is committed, or if somebody else is at it.

        Args:
            target: the set.
            tar: the tar.
            first_block: its first block, from `first_blocks`.

        Raises:
            OlaError: it was committed when it had another content.
        """
        lease = Lease.acquire(target.path / "leases", tar.name)
        if lease is None:
            return None
        # In this order: a writer we took over from can no longer commit once its temporary file is gone.
        sweep(target.commit_file(tar))
        file = target.commit_file(tar)
        if not file.exists():
            return cls(target, tar, first_block, lease)
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
        of_scales = () if scales is None else (scales.dtype, scales.shape)
        found = Layout(values.dtype, values.shape, *of_scales)
        if found != self._target.identity.layout:
            raise ValueError(f"{key}: {found} does not fit {self._target.identity}")
        value_bytes = values.tobytes()
        scale_bytes = b"" if scales is None else scales.tobytes()
        row = self._row(key, image_index, image_hash, "ok", None)
        row |= {
            "values_bytes": len(value_bytes),
            "scales_bytes": len(scale_bytes),
            "checksum": checksum(key, scale_bytes, value_bytes),
            "rms": rms,
            "absmax": absmax,
        }
        self._append(row, value_bytes, scale_bytes)

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
        metadata = {"tar": self._tar.name, "tar_hash": self._tar.hash, "digest": self._target.identity.digest}
        table = pa.Table.from_pylist(self._rows, COMMIT_SCHEMA).replace_schema_metadata(metadata)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        file = self._target.commit_file(self._tar)
        self._fenced(publish, file, buffer.getvalue())

    def _row(
        self, key: str, image_index: int, image_hash: str | None, status: str, reason: str | None
    ) -> dict[str, Any]:
        """A row without a target (yet)."""
        row = dict.fromkeys(("block", "row", "values_offset", "values_bytes", "scales_offset", "scales_bytes"), -1)
        named = {"key": key, "image_index": image_index, "image_hash": image_hash, "status": status, "reason": reason}
        return {**named, **row, "checksum": 0, "rms": 0.0, "absmax": 0.0}

    def _append(self, row: dict[str, Any], values: bytes | None, scales: bytes | None) -> None:
        row |= {"block": self._block, "row": len(self._values)}
        self._pending.append(row)
        self._values.append(values)
        self._scales.append(scales)
        if len(self._values) == self._target.block:
            self._publish_block()

    def _publish_block(self) -> None:
        padding: list[bytes | None] = [None] * (self._target.block - len(self._values))
        data, offsets = shard(self._values + padding)
        self._publish(self._target.values_file(self._block), data)
        scale_offsets = [-1] * self._target.block
        if self._target.identity.layout.scales_dtype:
            scale_data, scale_offsets = shard(self._scales + padding)
            self._publish(self._target.scales_file(self._block), scale_data)
        for row in self._pending:
            if row["status"] == "ok":
                row["values_offset"] = offsets[row["row"]]
                row["scales_offset"] = scale_offsets[row["row"]]
        self._rows += self._pending
        self._pending, self._values, self._scales = [], [], []
        self._block += 1

    def _publish(self, file: Path, data: bytes) -> None:
        """A shard under its final name; what a dead writer left there uncommitted is kept if equal, else replaced."""
        sweep(file)
        try:
            self._fenced(publish, file, data)
        except FileExistsError:
            if file.read_bytes() != data:
                self._fenced(replace, file, data)

    def _fenced(self, write: Callable[[Path, bytes, Check], None], file: Path, data: bytes) -> None:
        try:
            write(file, data, self._lease.check)
        except FileNotFoundError:  # our temporary file was swept, which only a successor does
            self._lease.check()
            raise
