"""The pinned snapshot: exactly which samples, images and targets a run trains on (contract 3, promises 1, 7, 8).

    tars.parquet        per tar: its hash, its usable samples; of every commit used, hash, size and time
    snapshot.json       what was asked for, corpora and target sets by name, counts; written last
    left_out.parquet    every image that lacks something, and why
    group_keys.npy      one int64 per sample: images · 2³² + characters, for length grouping

It is made once, before the first step; whoever resumes loads it and checks that corpus and store still are what was
pinned. That opens no tar and, where file sizes and times are the pinned ones, no commit: one listing of each target set
is enough. A tar's index and commits are read, and compared once more, when a sample of it is first asked for. A corpus
may have grown since: new tars are not in the snapshot and change nothing.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from olavlm.config import PipelineConfig, View
from olavlm.data.atomic import replace
from olavlm.data.cache import Cache
from olavlm.data.corpus import Corpus, Tar, content_hash, read_parquet
from olavlm.data.folder import fsync
from olavlm.data.manifest import listed, summaries
from olavlm.data.targets import TargetSet, TargetStore
from olavlm.errors import OlaError
from train.order import Ints

LEFT_OUT_SCHEMA = pa.schema(
    [
        ("data", pa.string()),
        ("tar", pa.string()),
        ("key", pa.string()),
        ("image_index", pa.int32()),
        ("task", pa.string()),  # null: the image itself is unusable, and with it the sample
        ("reason", pa.string()),
    ]
)
Rows = np.ndarray[Any, np.dtype[np.bool_]]  # of a tar's index, one bool each

#: Tars whose index and commits are kept in memory, about 1 MB each.
_TABLES = 1024


@dataclass(frozen=True)
class Request:
    """What a stage asks of its data."""

    stage: str
    data: tuple[str, ...]
    tasks: tuple[str, ...]  # whose targets are learned: an image may lack them
    view: View
    allow_view_mismatch: bool = False
    max_missing: float = 0.01
    encoders: tuple[str, ...] = ()  # whose targets the student is fed: without one, an image's sample is left out

    @property
    def read(self) -> tuple[str, ...]:
        """Everything whose targets are read, once."""
        return tuple(dict.fromkeys((*self.tasks, *self.encoders)))


@dataclass(frozen=True)
class Image:
    """One image of a sample, and the commit row of each task's target (None: it has none, see left_out.parquet)."""

    index: int
    offset: int
    bytes: int
    hash: str
    targets: dict[str, dict[str, Any] | None]


@dataclass(frozen=True)
class Sample:
    """Where a sample's text, images and targets lie."""

    data: str
    tar: Tar
    key: str
    text_member: str
    text_offset: int
    text_bytes: int
    images: list[Image]

    def __str__(self) -> str:
        return f"data {self.data}, tar {self.tar.name}, sample {self.key!r}"


class _Table:
    """A tar's index joined with its commits, and the rows of its usable samples.

    Those are the samples whose images can all be decoded, and all have the features that the student is fed.
    """

    def __init__(self, index: pa.Table, commits: dict[str, pa.Table], encoders: tuple[str, ...]):
        self.index, self.commits = index, commits
        keys = index["key"].to_numpy()
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.empty(0, np.int64)
        ends = np.append(starts[1:], len(keys))
        self.undecodable = index["error"].is_valid().to_numpy()
        unusable = self.undecodable.copy()
        for task in encoders:
            unusable |= self.lacks(task)
        usable = ~np.array([unusable[a:b].any() for a, b in zip(starts, ends, strict=True)], bool)
        self.starts, self.ends = starts[usable], ends[usable]
        self._index_rows = _structs(index)
        self._commit_rows = {task: _structs(commit) for task, commit in commits.items()}

    def lacks(self, task: str) -> Rows:
        """Which rows are images without a target of `task`."""
        has_image: Rows = self.index["image_index"].to_numpy() >= 0
        commit = self.commits.get(task)
        if commit is None:
            return has_image
        missing: Rows = has_image & (commit["status"].to_numpy() != "ok")
        return missing

    def group_keys(self) -> Ints:
        """images · 2³² + characters of every usable sample."""
        has_image = self.index["image_index"].to_numpy() >= 0
        images = np.array([has_image[a:b].sum() for a, b in zip(self.starts, self.ends, strict=True)], np.int64)
        keys: Ints = (images << 32) | self.index["text_length"].to_numpy()[self.starts].astype(np.int64)
        return keys

    def sample(self, data: str, tar: Tar, number: int) -> Sample:
        """The `number`-th usable sample."""
        span = range(int(self.starts[number]), int(self.ends[number]))
        rows = [self._index_rows[i].as_py() for i in span]
        commits = {task: [structs[i].as_py() for i in span] for task, structs in self._commit_rows.items()}
        images = [
            Image(
                row["image_index"], row["image_offset"], row["image_bytes"], row["image_hash"],
                {task: of[i] if of[i]["status"] == "ok" else None for task, of in commits.items()},
            )
            for i, row in enumerate(rows) if row["image_index"] >= 0
        ]  # fmt: skip
        first = rows[0]
        return Sample(data, tar, first["key"], first["text_member"], first["text_offset"], first["text_bytes"], images)


def _structs(table: pa.Table) -> pa.StructArray:
    """The table by rows: one of them is a dict in a tenth of the time that a slice of the table takes."""
    columns = [column.combine_chunks() for column in table.columns]
    return pa.StructArray.from_arrays(columns, names=table.column_names)


class Snapshot:
    """The pinned data of a run; samples are numbered through, data set after data set, tar after tar.

    Attributes:
        tasks: whose targets its images have.
    """

    def __init__(
        self,
        corpora: dict[str, Corpus],
        targets: dict[str, dict[str, TargetSet]],
        pinned: pa.Table,
        group_keys: Ints,
        request: Request,
    ):
        self.corpora, self.targets, self._pinned, self.group_keys = corpora, targets, pinned, group_keys
        self.tasks, self._encoders = request.read, request.encoders
        self._starts = np.append(0, np.cumsum(pinned["samples"].to_numpy()))
        self._tables: OrderedDict[int, tuple[str, Tar, _Table]] = OrderedDict()  # with the data's name
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Usable samples per data set."""
        of_data = (pc.equal(self._pinned["data"], name) for name in self.corpora)
        return tuple(pc.sum(self._pinned.filter(rows)["samples"]).as_py() for rows in of_data)

    def sample(self, number: int) -> Sample:
        """Sample `number` of ``[0, sum(sizes))``. Safe to call from many threads.

        Raises:
            OlaError: a commit is not the pinned one any more.
        """
        t = int(np.searchsorted(self._starts, number, side="right")) - 1
        with self._lock:
            found = self._tables.get(t)
            if found:
                self._tables.move_to_end(t)
        if found is None:
            (pinned,) = self._pinned.slice(t, 1).to_pylist()
            data = pinned["data"]
            corpus, targets = self.corpora[data], self.targets[data]
            commits = {task: pinned[task] for task in targets}
            found = data, corpus.tar(pinned["name"]), _load(corpus, targets, pinned["name"], commits, self._encoders)
            with self._lock:
                self._tables[t] = found
                if len(self._tables) > _TABLES:
                    self._tables.popitem(last=False)
        data, tar, table = found
        return table.sample(data, tar, number - int(self._starts[t]))

    @classmethod
    def open(cls, folder: Path, config: PipelineConfig, request: Request) -> "Snapshot":
        """The snapshot pinned in a run's folder, checked against corpus and store; pinned now if there is none.

        Raises:
            OlaError: corpus or targets are missing, changed since they were pinned, of another corpus, teacher or view;
                or more than ``max_missing`` of the images lack something. The message says what, and how to go on.
        """
        corpora, targets = find_data(config, request)
        file = folder / "snapshot.json"
        if not file.exists():
            _pin(folder, request, corpora, targets)
        saved = json.loads(file.read_text())["data"]
        pinned = read_parquet(folder / "tars.parquet", _schema(request.read))
        for name, corpus in corpora.items():
            if saved[name]["corpus_id"] != corpus.id:
                then = saved[name]["corpus_id"]
                raise OlaError(f"{file}: pinned corpus {then}, data.{name}.corpus is now {corpus.id}")
            _check(file, corpus, targets[name], pinned.filter(pc.equal(pinned["data"], name)))
        group_keys = np.load(folder / "group_keys.npy", mmap_mode="r")
        return cls(corpora, targets, pinned, group_keys, request)


def find_data(config: PipelineConfig, request: Request) -> tuple[dict[str, Corpus], dict[str, dict[str, TargetSet]]]:
    """The corpora asked for, and every task's target set of each, by data name; nothing is written.

    Raises:
        OlaError: one is missing, or of another corpus, teacher or view than the pipeline states, or one task's are of
            several teachers (promise 7).
    """
    cache = Cache(Path(config.cache.folder), int(config.cache.gib * 2**30)) if config.cache else None
    corpora = {name: Corpus.open(config.data[name].corpus, cache) for name in request.data}
    targets = {name: _find_targets(config, request, name, corpus, cache) for name, corpus in corpora.items()}
    for task in request.read:
        sets = {name: of_task[task].path.name for name, of_task in targets.items()}
        if len({*sets.values()}) > 1:
            found = ", ".join(f"data.{name}.targets has {folder}" for name, folder in sets.items())
            raise OlaError(f"{request.stage}: the {task} targets are not of one teacher: {found}")
    return corpora, targets


def _find_targets(
    config: PipelineConfig, request: Request, name: str, corpus: Corpus, cache: Cache | None
) -> dict[str, TargetSet]:
    """The target set of every task asked for, refused if it is not what the pipeline states (promise 7)."""
    if not request.read:
        return {}
    path = config.data[name].targets
    if path is None:
        raise OlaError(f"data.{name}.targets: missing, and {request.stage} needs targets of {', '.join(request.read)}")
    store = TargetStore.open(path, corpus.id, cache)
    found = {task: store.find(task, config.teachers[task]) for task in request.read}
    for task, target in found.items():
        if target.identity.view != request.view and not request.allow_view_mismatch:
            raise OlaError(
                f"{target.path}: the {task} teacher saw view {target.identity.view!r}, the student of {request.stage} "
                f"sees {request.view!r}, so their grids show different pixels; give both the same view, or set "
                f"stages.{request.stage}.allow_view_mismatch=true to train so all the same"
            )
    return found


def _pin(folder: Path, request: Request, corpora: dict[str, Corpus], targets: dict[str, dict[str, TargetSet]]) -> None:
    """Join every index with its commits, settle what is missing, and write the snapshot; snapshot.json comes last."""
    data: dict[str, Any] = {}
    pinned: list[pa.Table] = []
    group_keys: list[Ints] = []
    left_out: list[dict[str, Any]] = []
    images = 0
    for name, corpus in corpora.items():
        there = {task: listed(target) for task, target in targets[name].items()}  # before any of them is opened
        tars = []
        for tar in corpus.tars:
            files = {task: target.commit_file(tar) for task, target in targets[name].items()}
            commits = {task: content_hash(file.read_bytes()) for task, file in files.items() if file.exists()}
            table = _load(corpus, targets[name], tar.name, commits, request.encoders)
            left_out += ({"data": name, "tar": tar.name, **row} for row in _missing(table, request.read))
            images += tar.images
            group_keys.append(table.group_keys())
            row = {"data": name, "name": tar.name, "hash": tar.hash, "samples": len(table.starts)}
            tars.append(row | commits)
        pinned.append(_with_stamps(pa.Table.from_pylist(tars, _schema(request.read)), there))
        data[name] = {
            "corpus": str(corpus.path),
            "corpus_id": corpus.id,
            "tars": len(tars),
            "samples": sum(tar["samples"] for tar in tars),
            "targets": {task: target.path.name for task, target in targets[name].items()},
        }
        if not data[name]["samples"]:
            _refuse_if_too_many(request, left_out, images)
            raise OlaError(f"data.{name}.corpus: {corpus.path} holds no sample that {request.stage} could train on")
    _refuse_if_too_many(request, left_out, images)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "group_keys.npy", np.concatenate(group_keys))
    pq.write_table(pa.Table.from_pylist(left_out, LEFT_OUT_SCHEMA), folder / "left_out.parquet")
    pq.write_table(pa.concat_tables(pinned), folder / "tars.parquet", compression="zstd")
    for name in ("group_keys.npy", "left_out.parquet", "tars.parquet", "."):  # what snapshot.json vouches for
        fsync(folder / name)
    counts = {str(key): count for key, count in _count(left_out).items()}
    asked = {"tasks": request.tasks, "encoders": request.encoders, "view": request.view}
    content = {**asked, "images": images, "left_out": counts, "data": data}
    replace(folder / "snapshot.json", json.dumps(content, indent=1).encode())


def _missing(table: _Table, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows for left_out.parquet: undecodable images, and images of decodable samples without a task's target."""
    keys, numbers, errors = (table.index[c].to_pylist() for c in ("key", "image_index", "error"))
    rows = [
        {"key": keys[i], "image_index": numbers[i], "task": None, "reason": errors[i]}
        for i in np.flatnonzero(table.undecodable)
    ]
    left_out = {keys[i] for i in np.flatnonzero(table.undecodable)}
    for task in tasks:
        commit = table.commits.get(task)
        status = commit["status"].to_pylist() if commit else ["missing"] * len(keys)
        reasons = commit["reason"].to_pylist() if commit else ["its tar is not featurized"] * len(keys)
        rows += [
            {"key": keys[i], "image_index": numbers[i], "task": task, "reason": reasons[i] or status[i]}
            for i in np.flatnonzero(table.lacks(task))
            if keys[i] not in left_out
        ]
    return rows


def _count(left_out: list[dict[str, Any]]) -> dict[str | None, int]:
    """Images left out, by task (None: the image itself)."""
    tasks = [row["task"] for row in left_out]
    return {task: tasks.count(task) for task in dict.fromkeys(tasks)}


def _refuse_if_too_many(request: Request, left_out: list[dict[str, Any]], images: int) -> None:
    """Raise if more than ``max_missing`` of the images lack one task's target, or cannot be decoded (promise 8)."""
    for task, count in _count(left_out).items():
        if count > request.max_missing * images:
            rows = [row for row in left_out if row["task"] == task]
            examples = "; ".join(f"{r['data']}/{r['tar']}/{r['key']}: {r['reason']}" for r in rows[:3])
            what = f"have no {task} target" if task else "cannot be decoded"
            raise OlaError(
                f"{request.stage}: {count} of {images} images ({count / images:.2%}) {what}, max_missing is "
                f"{request.max_missing:.2%} ({examples}); run `python -m featurize run` to fill the gaps, or raise "
                "max_missing to train without them"
            )


def _schema(tasks: tuple[str, ...]) -> pa.Schema:
    """Of tars.parquet; the columns of a task are null where its commit was not there."""
    of_tasks = [
        field
        for task in tasks
        for field in ((task, pa.string()), (f"{task}_bytes", pa.int64()), (f"{task}_time", pa.int64()))
    ]
    return pa.schema(
        [("data", pa.string()), ("name", pa.string()), ("hash", pa.string()), ("samples", pa.int64()), *of_tasks]
    )


def _stamps(pinned: pa.Table, there: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Size and time of the pinned tars' commit files in a listing of them; null where there is none."""
    found = there.take(pc.index_in(pinned["name"], there["tar"]))
    return found["file_bytes"], found["file_time"]


def _with_stamps(pinned: pa.Table, there: dict[str, pa.Table]) -> pa.Table:
    """Rows of tars.parquet with sizes and times from a listing, per task, that is older than their hashes."""
    for task, listing in there.items():
        for column, values in zip((f"{task}_bytes", f"{task}_time"), _stamps(pinned, listing), strict=True):
            pinned = pinned.set_column(pinned.schema.get_field_index(column), column, values)
    return pinned


def _check(file: Path, corpus: Corpus, targets: dict[str, TargetSet], pinned: pa.Table) -> None:
    """Raise if a pinned tar or commit is gone or changed; opens the commits only whose files are not as pinned."""
    names, hashes = (pa.array([getattr(tar, key) for tar in corpus.tars], pa.string()) for key in ("name", "hash"))
    now = hashes.take(pc.index_in(pinned["name"], names))
    other = pc.invert(pc.fill_null(pc.equal(now, pinned["hash"]), False))
    if pc.any(other).as_py():
        row, digest = pinned.filter(other).slice(0, 1).to_pylist()[0], now.filter(other)[0].as_py()
        raise OlaError(
            f"{file}: pinned tar {row['name']} of {corpus.path} with hash {row['hash']}, "
            f"now it is {f'hash {digest}' if digest else 'gone'}"
        )
    for task, target in targets.items():
        committed = pinned.filter(pc.is_valid(pinned[task]))
        size, time = _stamps(committed, listed(target))
        same = pc.and_(pc.equal(size, committed[f"{task}_bytes"]), pc.equal(time, committed[f"{task}_time"]))
        touched = committed.filter(pc.invert(pc.fill_null(same, False)))
        tars = [corpus.tar(name) for name in touched["name"].to_pylist()]
        found = summaries(target, tars)["content"].to_pylist() if tars else []
        for tar, digest, content in zip(tars, touched[task].to_pylist(), found, strict=True):
            if digest != content and not target.superseded_file(tar, digest).exists():
                raise _unusable(target, tar, digest)


def _unusable(target: TargetSet, tar: Tar, digest: str) -> OlaError:
    """The error for a pinned commit that is neither there nor kept as superseded, or not of the tar as it is now."""
    path = target.commit_file(tar)
    found = content_hash(path.read_bytes()) if path.exists() else "gone"
    if found == digest:
        return OlaError(
            f"{path}: made when tar {tar.name} had another content than the corpus now says (hash {tar.hash}); "
            "featurize this corpus into a store of its own"
        )
    return OlaError(
        f"{path}: this commit has changed since the run was pinned (then {digest}, now {found}); "
        "remove the run's folder to train on the new targets, or restore the old ones"
    )


def _load(
    corpus: Corpus,
    targets: dict[str, TargetSet],
    name: str,
    pinned: Mapping[str, str | None],
    encoders: tuple[str, ...],
) -> _Table:
    """A tar's index and pinned commits, which must agree row by row on key, image index and image hash (promise 1)."""
    tar = corpus.tar(name)
    index = corpus.index(tar)
    commits = {}
    for task, digest in pinned.items():
        if digest is None:  # it was not committed
            continue
        commit = targets[task].commit(tar, digest)
        if commit is None:
            raise _unusable(targets[task], tar, digest)
        if wrong := _difference(index, commit):
            raise OlaError(
                f"{targets[task].commit_file(tar)}: not of the images in {corpus.path}, tar {tar.name}: {wrong}"
            )
        commits[task] = commit
    return _Table(index, commits, encoders)


def _difference(index: pa.Table, commit: pa.Table) -> str | None:
    """Where a commit is about other images than the index; None if row by row they are the same."""
    if len(index) != len(commit):
        return f"{len(index)} rows in the index, {len(commit)} in the commit"
    for column in ("key", "image_index", "image_hash"):
        if index[column].equals(commit[column]):
            continue
        for row, (here, there) in enumerate(zip(index[column].to_pylist(), commit[column].to_pylist(), strict=True)):
            if here != there:
                sample = f"sample {index['key'][row]}, image {index['image_index'][row]}"
                return f"{column} of {sample} is {here!r} in the corpus and {there!r} in the commit"
    return None
