"""Contract 2, a second try: targets of images that were committed as failed, added to what is there.

Every chunk that a commit lists stays at its offset: new chunks are appended in front of a shard's new index, then the
commit is replaced. So whoever holds the old commit goes on reading right bytes, before, while and after; it is kept in
``superseded/``, where a training run that is pinned to it finds it again.
"""

from typing import Any

import numpy as np

from olavlm.data.atomic import publish, replace, sweep
from olavlm.data.commit import commit_bytes, fenced, ok_row, shard_index, target_bytes
from olavlm.data.corpus import content_hash
from olavlm.data.lease import Lease
from olavlm.data.objects import ObjectPath
from olavlm.data.targets import TargetSet, TarId
from olavlm.errors import OlaError


class TarAmender:
    """Tries one committed tar's failed images again; takes what a `TarWriter` takes, in the order of the corpus index.

    It holds at most one block in memory. A context manager: leaving it gives up the lease. Where nothing succeeds,
    nothing is written.

    Attributes:
        failed: positions in the commit, which are those in the corpus index, of the images to try.
    """

    def __init__(self, target: TargetSet, tar: TarId, rows: list[dict[str, Any]], lease: Lease):
        self._target, self._tar, self._rows, self._lease = target, tar, rows, lease
        self._places = {(row["key"], row["image_index"]): i for i, row in enumerate(rows) if row["status"] == "failed"}
        self.failed = frozenset(self._places.values())
        self._block = -1
        self._values: dict[int, bytes] = {}  # of the block being filled, by row
        self._scales: dict[int, bytes] = {}
        self._changed = False

    @staticmethod
    def check(target: TargetSet) -> None:
        """Raise if a set's shards cannot be added to.

        Raises:
            OlaError: it is in an object store, where nothing is ever replaced, or in the WebDataset form.
        """
        if isinstance(target.path, ObjectPath) or target.format == "webdataset":
            what = "in an object store" if isinstance(target.path, ObjectPath) else "in the WebDataset form"
            raise OlaError(f"{target.path}: {what}; failed images can be tried again in Zarr sets on a disk only")

    @classmethod
    def open(cls, target: TargetSet, tar: TarId) -> "TarAmender | None":
        """An amender for the tar; None if it is not committed, has no failed image, or if somebody else is at it."""
        lease = Lease.acquire(target.path / "leases", tar.name)
        if lease is None:
            return None
        sweep(target.commit_file(tar))  # before the commit is read: whom we took over from can no longer replace it
        commit = target.commit(tar)
        amender = cls(target, tar, [] if commit is None else commit.to_pylist(), lease)
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
        self._values[row["row"]], self._scales[row["row"]] = value_bytes, scale_bytes
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
        file = self._target.commit_file(self._tar)
        old = file.read_bytes()
        kept = self._target.superseded_file(self._tar, content_hash(old))
        sweep(kept)
        if not kept.exists():
            fenced(self._lease, publish, kept, old)
        fenced(self._lease, replace, file, commit_bytes(self._target, self._tar, self._rows))

    def _publish_block(self) -> None:
        if not self._values:
            return
        arrays = [("values", self._target.values_file(self._block), self._values)]
        if self._target.identity.layout.scales_dtype:
            arrays.append(("scales", self._target.scales_file(self._block), self._scales))
        for name, file, chunks in arrays:
            listed = [row for row in self._rows if row["block"] == self._block and row[f"{name}_offset"] >= 0]
            end = max((row[f"{name}_offset"] + row[f"{name}_bytes"] for row in listed), default=0)
            # From the end of what is listed, not of the file: a killed try leaves chunks behind, which are not ours.
            data = bytearray(file.read_bytes()[:end] if end else b"")
            if len(data) < end:
                raise OlaError(f"{file}: cut short, {len(data)} of {end} bytes; run `python -m featurize repair` first")
            ranges = {row["row"]: (row[f"{name}_offset"], row[f"{name}_bytes"]) for row in listed}
            places = {row["row"]: row for row in self._rows if row["block"] == self._block}
            for number, chunk in sorted(chunks.items()):
                places[number][f"{name}_offset"] = len(data)
                ranges[number] = len(data), len(chunk)
                data += chunk
            sweep(file)
            fenced(self._lease, replace, file, bytes(data) + shard_index(self._target.block, ranges))
        self._values, self._scales = {}, {}
