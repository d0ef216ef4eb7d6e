"""Contract 1, the writing side: tars and their index become part of a corpus all at once, or not at all.

While a job runs, its finished tars are listed in ``pending.jsonl`` only: a line that names the job, then one per tar.
The end of the job moves them to ``tars.parquet`` and, for a new corpus, writes ``corpus.json``. A job that was killed
leaves a corpus without its tars (or no corpus); the same job started again goes on after the last pending tar, another
job removes them first.
"""

import fcntl
import io
import json
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featurize.corpus.samples import ImageFacts, Issue, Text, index_rows
from olavlm.data import atomic
from olavlm.data.corpus import (
    INDEX_SCHEMA,
    SCHEMA_VERSION,
    TARS_SCHEMA,
    Corpus,
    Tar,
    content_hash,
    file_hash,
    index_file,
)
from olavlm.errors import OlaError


class CorpusWriter:
    """One job that makes or grows the corpus in a folder; a context manager.

    Attributes:
        out: the corpus folder.
        tars: the corpus' tars, then this job's.
        names: their names.
        resumed: how many of this job's tars a killed run of it has left.
        left_out: what was found wrong with this job's tars when they were added.
    """

    def __init__(self, out: Path, job: str) -> None:
        """Prepare; nothing is touched before ``with``.

        Args:
            out: the corpus folder; made if absent.
            job: ``pack`` or ``adopt`` and a hash of what, by which a rerun knows its own pending tars.
        """
        self.out = out
        self.job = job
        self.tars: list[Tar] = []
        self.names: set[str] = set()
        self.resumed = 0
        self.left_out: list[Issue] = []
        self._finished = 0
        self._lock = -1

    def __enter__(self) -> "CorpusWriter":
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OlaError(f"{self.out}: another process is packing into this corpus") from None
        finished = Corpus.open(self.out).tars if (self.out / "corpus.json").exists() else []
        self._finished = len(finished)
        self.names = {tar.name for tar in finished}
        self.tars = finished
        self._take_up()
        self.resumed = len(self.tars) - self._finished
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._lock)

    def add(self, tar: Tar, index: pa.Table, left_out: Sequence[Issue] = ()) -> None:
        """List a tar as pending, with what was found wrong with it, and write its index (`INDEX_SCHEMA`).

        In this order, so that no file of the corpus is ever unlisted; a tar whose index is missing is not taken up.
        """
        if not self._pending.exists():
            self._list_pending([])
        with open(self._pending, "ab") as pending:  # one line more, whatever the number of tars
            pending.write(_line({"tar": asdict(tar), "left_out": [asdict(issue) for issue in left_out]}))
            pending.flush()
            os.fsync(pending.fileno())
        atomic.replace(index_file(self.out, tar.name), to_parquet(index, {"tar_hash": tar.hash}))
        self._take(tar, left_out)

    def finish(self, sources: set[str], left_out: Sequence[Issue], renamed: Sequence[Issue]) -> None:
        """Make the pending tars part of the corpus.

        Args:
            sources: what was packed; their lines in the lists replace those of an earlier run.
            left_out: for ``left_out.jsonl``.
            renamed: for ``renamed.jsonl``.

        Raises:
            OlaError: the corpus would be empty.
        """
        if not self.tars:
            first = f"; {len(left_out)} left out, such as {left_out[0].file}: {left_out[0].reason}" if left_out else ""
            raise OlaError(f"{self.out}: nothing to make a corpus of{first}")
        _merge(self.out / "left_out.jsonl", sources, left_out)
        _merge(self.out / "renamed.jsonl", sources, renamed)
        if len(self.tars) > self._finished:
            atomic.replace(self.out / "tars.parquet", to_parquet(_table(self.tars), {}))
        if not self._finished:
            corpus_id = content_hash("".join(tar.hash for tar in self.tars).encode())
            header = {"schema": SCHEMA_VERSION, "id": corpus_id}
            atomic.replace(self.out / "corpus.json", (json.dumps(header, indent=2) + "\n").encode())
        self._pending.unlink(missing_ok=True)

    @property
    def _pending(self) -> Path:
        return self.out / "pending.jsonl"

    def _list_pending(self, entries: list[dict[str, Any]]) -> None:
        """Set what is pending of this job."""
        atomic.replace(self._pending, b"".join(map(_line, [{"job": self.job}, *entries])))

    def _take(self, tar: Tar, left_out: Sequence[Issue]) -> None:
        self.tars.append(tar)
        self.names.add(tar.name)
        self.left_out += left_out

    def _take_up(self) -> None:
        """Take this job's pending tars; what a killed run left otherwise is removed."""
        for pattern in (".*.jsonl.*-*.tmp", ".*.parquet.*-*.tmp", "index/.*.parquet.*-*.tmp", "tars/.*.tar.*-*.tmp"):
            for leftover in self.out.glob(pattern):
                leftover.unlink()
        atomic.sweep(self.out / "corpus.json")
        if not self._pending.exists():
            return
        lines = self._pending.read_bytes().splitlines(keepends=True)
        job, *entries = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may be cut
        same = job["job"] == self.job
        kept = []
        for entry in entries:
            tar = Tar(**entry["tar"])
            if tar.name in self.names:
                continue
            if same and (self.out / tar.path).exists() and index_file(self.out, tar.name).exists():
                kept.append(entry)
                self._take(tar, [Issue(**issue) for issue in entry["left_out"]])
                continue
            if job["job"].startswith("pack "):  # adopted tars are not ours to remove
                (self.out / tar.path).unlink(missing_ok=True)
            index_file(self.out, tar.name).unlink(missing_ok=True)
        self._list_pending(kept)


class TarBuilder:
    """One tar being packed: written beside its final name, listed as pending, then published under it.

    Members carry no owner and no time: the same samples give the same bytes.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.name = name
        self.samples = 0
        self._out = out
        self._path = out / packed_path(name)
        self._path.parent.mkdir(exist_ok=True)
        self._temporary = self._path.parent / f".{self._path.name}.{os.getpid()}-{self.name}.tmp"
        self._rows: list[dict[str, Any]] = []
        self._file = open(self._temporary, "xb")  # noqa: SIM115 – closed by publish or discard
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, key: str, images: list[tuple[str, bytes, ImageFacts]], text: bytes, length: int) -> None:
        """Append a sample: images (extension, encoded bytes, facts), then JSON; `length`: characters of its turns."""
        described = []
        for i, (extension, data, facts) in enumerate(images):
            name = f"{key}.{i}.{extension}" if len(images) > 1 else f"{key}.{extension}"
            described.append((self._append(name, data), facts))
        offset = self._append(f"{key}.json", text)
        self._rows += index_rows(key, described, Text("json", offset, len(text), length))
        self.samples += 1

    def publish(self, writer: CorpusWriter) -> None:
        """Close the tar and hand it to the corpus.

        Raises:
            OlaError: a file that is no part of the corpus has its name.
        """
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        images = sum(row["image_index"] >= 0 for row in self._rows)
        size = self._temporary.stat().st_size
        tar = Tar(self.name, packed_path(self.name), file_hash(self._temporary), size, self.samples, images)
        if self._path.exists():
            raise OlaError(
                f"{self._path}: this file is in the way and no part of the corpus; move it or choose another --out"
            )
        index = pa.Table.from_pylist(self._rows, INDEX_SCHEMA)
        writer.add(tar, index)  # first, so that a tar under its final name is always listed and never an orphan
        os.replace(self._temporary, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Remove what is not published."""
        with suppress(OSError):  # a full disk says so again when the buffer is flushed
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _append(self, name: str, data: bytes) -> int:
        """Write a member; the offset of its data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def packed_path(name: str) -> str:
    """Where packing puts a tar, relative to the corpus."""
    return f"tars/{name}.tar"


def to_parquet(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """A table as a Parquet file with this schema metadata."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return bytes(sink.getvalue())


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _table(tars: list[Tar]) -> pa.Table:
    return pa.Table.from_pylist([asdict(tar) for tar in tars], TARS_SCHEMA)


def _merge(file: Path, sources: set[str], issues: Sequence[Issue]) -> None:
    """Set the lines of these sources in a list of issues."""
    old = file.read_text().splitlines() if file.exists() else []
    lines = [line for line in old if json.loads(line)["source"] not in sources] + sorted(
        issue.line() for issue in issues
    )
    atomic.replace(file, "".join(f"{line}\n" for line in lines).encode())
