"""What the commits of a target set say, in short, without opening each: counts, bytes and content hash per tar.

``manifest.parquet`` remembers it for the commits there were when `compact` wrote it. It is never the truth against a
commit: the folder of commits is listed every time, a commit that is new or whose size or time is not the remembered one
is opened itself, and what was withdrawn is gone. So anybody may commit, retry, repair or drop without knowing of it,
and a lost or damaged manifest costs only time.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from olavlm.data.atomic import replace
from olavlm.data.corpus import content_hash, read_parquet
from olavlm.data.files import listing
from olavlm.data.objects import AnyPath
from olavlm.data.targets import TargetSet, TarId
from olavlm.errors import OlaError

SUMMARY_SCHEMA = pa.schema(
    [
        ("tar", pa.string()),
        ("tar_hash", pa.string()),
        ("content", pa.string()),  # `content_hash` of the commit file
        ("ok", pa.int64()),  # images
        ("failed", pa.int64()),
        ("bytes", pa.int64()),  # of the targets
        ("file_bytes", pa.int64()),  # the commit file's, and its time: whether it still is the one that was opened
        ("file_time", pa.int64()),  # nanoseconds
    ]
)
_STAMP = ["file_bytes", "file_time"]
_COMMIT = ".parquet"

_BATCH = 256

Progress = Callable[[Sequence[int]], Iterable[int]]


def summaries(target: TargetSet, tars: Sequence[TarId]) -> pa.Table:
    """What is committed of these tars.

    Returns:
        ``content`` (null: not committed, or when the tar had another content), ``ok``, ``failed``, ``bytes``, in the
        order of the tars.

    Raises:
        OlaError: a commit that is not in the manifest cannot be read.
    """
    names = pa.array([tar.name for tar in tars], pa.string())
    there = listed(target)
    found = _summarize(target, there.filter(pc.is_in(there["tar"], names)))
    aligned = found.take(pc.index_in(names, found["tar"]))
    valid = pc.fill_null(pc.equal(aligned["tar_hash"], pa.array([tar.hash for tar in tars], pa.string())), False)
    columns: dict[str, Any] = {"content": pc.if_else(valid, aligned["content"], pa.scalar(None, pa.string()))}
    columns |= {name: pc.if_else(valid, aligned[name], 0) for name in ("ok", "failed", "bytes")}
    return pa.table(columns)


def compact(target: TargetSet, progress: Progress = lambda batches: batches) -> int:
    """Write the manifest anew; commits the old one knows are not opened again.

    Args:
        target: the set.
        progress: wraps the batches of commits that have to be opened.

    Returns:
        The number of commits in it.
    """
    table = _summarize(target, listed(target), progress).sort_by("tar")
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    while True:
        with suppress(FileNotFoundError):  # a `gc` swept our temporary file
            replace(manifest_file(target), data)
            return len(table)


def manifest_file(target: TargetSet) -> AnyPath:
    """Where the set's manifest is, if it was ever compacted."""
    return target.path / "manifest.parquet"


def listed(target: TargetSet) -> pa.Table:
    """Every commit file as its folder lists it, none of them opened: ``tar``, ``file_bytes``, ``file_time``."""
    files = [file for file in listing(target.path / "commits") if file.name.endswith(_COMMIT) and file.name[0] != "."]
    names = [file.name.removesuffix(_COMMIT) for file in files]
    sizes, times = [file.size for file in files], [file.time for file in files]
    columns = [pa.array(names, pa.string()), pa.array(sizes, pa.int64()), pa.array(times, pa.int64())]
    return pa.table(dict(zip(["tar", *_STAMP], columns, strict=True)))


def _summarize(target: TargetSet, there: pa.Table, progress: Progress = lambda batches: batches) -> pa.Table:
    """A row (`SUMMARY_SCHEMA`) per listed commit, from the manifest where that still holds."""
    known = _known(target)
    known = known.take(pc.index_in(there["tar"], known["tar"]))
    same = pc.fill_null(pc.and_(*(pc.equal(known[column], there[column]) for column in _STAMP)), False)
    unknown = there.filter(pc.invert(same))
    batches = range(0, len(unknown), _BATCH)
    tables = [known.filter(same)]
    with ThreadPoolExecutor(8) as pool:
        for start in progress(batches):
            listed = unknown.slice(start, _BATCH).to_pylist()
            opened = pool.map(lambda row: _open(target, row["tar"]), listed)
            # Listed before it was opened: one that was replaced in between will not look known.
            rows = [{**summary, **row} for row, summary in zip(listed, opened, strict=True) if summary]
            tables.append(pa.Table.from_pylist(rows, SUMMARY_SCHEMA))
    return pa.concat_tables(tables)


def _known(target: TargetSet) -> pa.Table:
    """The manifest; empty if there is none, or a damaged one."""
    try:
        return read_parquet(manifest_file(target), SUMMARY_SCHEMA)
    except OlaError:
        return SUMMARY_SCHEMA.empty_table()


def _open(target: TargetSet, name: str) -> dict[str, Any] | None:
    """What one commit says; None if it was withdrawn meanwhile."""
    file = target.path / "commits" / f"{name}{_COMMIT}"
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    table = target.parse_commit(file, data)
    count = {row["values"]: row["counts"] for row in pc.value_counts(table["status"]).to_pylist()}
    ok = table.filter(pc.equal(table["status"], "ok"))
    return {
        "tar_hash": table.schema.metadata[b"tar_hash"].decode(),
        "content": content_hash(data),
        "ok": count.get("ok", 0),
        "failed": count.get("failed", 0),
        "bytes": sum(pc.sum(ok[column]).as_py() or 0 for column in ("values_bytes", "scales_bytes")),
    }
