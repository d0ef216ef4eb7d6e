"""How fast stored samples become batches, against other loaders with identical samples on the same cores.

A sample is one of LLaVA-558K with targets of the published size: a JPEG of 448 × 336, its conversation, int8 targets of
576 × 1024 and 576 × 1536, and one of 1024 halves; 1.5 MB. From a warm disk, in order, every side makes batches of 16 of
the very same samples: decoded, resized to 336 × 336, normalised, tokenized, stacked. That they are the same is checked.

    ours         `train.loader.Loader`; it alone looks every sample up in the snapshot and checks every byte it reads
    pread        the same byte ranges by ``pread``, in as many threads as cores: the floor
    webdataset   tars of ``.jpg``, ``.json`` and ``.npy``
    litdata, streaming   their own formats, where installed (``pip install litdata mosaicml-streaming``)

Other loaders run with and without a worker process per core, whichever is faster; starting those is not counted.
"""

import importlib.util
import io
import json
import os
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from featurize.corpus.pack import pack_llava_json
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data import codec
from olavlm.data.commit import TarWriter, tar_blocks
from olavlm.data.corpus import Corpus, content_hash, conversation
from olavlm.data.images import decode_image
from olavlm.data.targets import Identity, TargetStore
from olavlm.errors import OlaError
from olavlm.model import OlaVlmProcessor
from pipelines.photos.photos import write_llava_json
from pipelines.throughput import only_cores
from train import student
from train.loader import IGNORED, Loader, MicroBatch, Targets
from train.snapshot import Request, Snapshot

SAMPLES = 256
BATCH = 16
SIZE = 336
LENGTH = 2048
ROUNDS = 5  # of every side, taken in turn; the median is reported

Record = dict[str, Any]  # jpg, json: bytes; every stored array by name
Collate = Callable[[list[Record]], MicroBatch]
Side = Callable[[], Iterable[MicroBatch]]  # one pass over all samples


def loaders(folder: Path) -> dict[str, Any]:
    """Samples per second of every side on one core and on all; what they read lies below `folder` meanwhile.

    Raises:
        OlaError: two sides do not give the same samples.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of other loaders' worker processes; ours uses one thread anyway
    shutil.rmtree(folder, ignore_errors=True)
    try:
        config = _store(folder)
        tasks = tuple(config.teachers)
        snapshot = Snapshot.open(folder / "run", config, Request("loaders", ("all",), tasks, "squash"))
        ranges = [_ranges(snapshot, tasks, number) for number in range(SAMPLES)]
        processor = _processor()
        collate = partial(_collate, processor, {task: config.teachers[task].codec for task in tasks})
        others = _write_others(folder, ranges)
        result: dict[str, Any] = {"samples": SAMPLES, "batch": BATCH, "versions": _versions(others), "cores": {}}
        for cores in sorted({1, len(os.sched_getaffinity(0))}):
            with only_cores(cores):
                ours = Loader(
                    snapshot,
                    processor,
                    list(tasks),
                    LENGTH,
                    range(SAMPLES // BATCH),
                    lambda step: [_chunk(step)],
                    cores,
                )
                sides: dict[str, Side] = {
                    "ours": lambda ours=ours: (batch for (batch,) in ours),  # type: ignore[misc]
                    "pread": partial(_pread, ranges, collate, cores),
                }
                for name, open_other in others.items():
                    for workers in (0, cores):
                        loader = open_other(collate, workers)
                        sides[f"{name}, {workers} workers"] = partial(iter, loader)
                _check_same(sides)
                result["cores"][cores] = _rates(sides)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(result: dict[str, Any], console: Console) -> None:
    """The rates as one table."""
    columns = [f"{cores} core{'s' * (cores > 1)}" for cores in result["cores"]]
    table = Table("loader", *columns, "ours ÷ it", title="samples / s, from a warm disk to batches of 16")
    names = dict.fromkeys(name for rates in result["cores"].values() for name in rates)
    best = dict.fromkeys(name.split(",")[0] for name in names)
    for side in best:
        rates = [
            max(rate for name, rate in of.items() if name.split(",")[0] == side) for of in result["cores"].values()
        ]
        ratios = (of["ours"] / rate for of, rate in zip(result["cores"].values(), rates, strict=True))
        table.add_row(side, *(f"{rate:.0f}" for rate in rates), ", ".join(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    missing = sorted({"litdata", "streaming"} - set(best))
    if missing:
        console.print(f"not installed, so not compared: {', '.join(missing)}", highlight=False)


# ---- the sides


def _collate(processor: OlaVlmProcessor, codecs: dict[str, Any], records: list[Record]) -> MicroBatch:
    """A batch as the loader of ours makes it; litdata gives bytes as memory views."""
    texts = [processor.encode_conversation(conversation("json", bytes(record["json"])), LENGTH) for record in records]
    ids, labels = [text.input_ids for text in texts], [text.labels for text in texts]
    stack = lambda name: torch.from_numpy(np.stack([record[name] for record in records]))  # noqa: E731
    valid = torch.ones(len(records), dtype=torch.bool)
    return MicroBatch(
        pad_sequence(ids, batch_first=True, padding_value=processor.tokenizer.pad_token_id),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        processor.pixel_values([decode_image(bytes(record["jpg"])) for record in records]),
        {
            task: Targets(stack(task), stack(f"{task}.scales") if f"{task}.scales" in records[0] else None, valid, of)  # type: ignore[no-untyped-call]
            for task, of in codecs.items()
        },
        [""] * len(records),
        [text.answers_cut for text in texts],
    )


def _pread(ranges: list[list[Any]], collate: Collate, threads: int) -> Iterator[MicroBatch]:
    """Batches from byte ranges that are known already."""
    paths = {path for of_sample in ranges for _, path, *_ in of_sample}
    descriptors = {path: os.open(path, os.O_RDONLY) for path in paths}

    def make(step: int) -> MicroBatch:
        return collate([_read(ranges[number], descriptors) for number in _chunk(step)])

    ahead: deque[Future[MicroBatch]] = deque()
    try:
        with ThreadPoolExecutor(threads) as pool:
            for step in range(SAMPLES // BATCH):
                ahead.append(pool.submit(make, step))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _write_others(folder: Path, ranges: list[list[Any]]) -> dict[str, Callable[[Collate, int], Iterable[MicroBatch]]]:
    """The samples once more for every other loader that is installed; each opens with so many worker processes."""
    found: dict[str, Callable[[Collate, int], Iterable[MicroBatch]]] = {}
    kinds = {"webdataset": _webdataset, "litdata": _litdata, "streaming": _streaming}
    for name, kind in kinds.items():
        if importlib.util.find_spec(name):
            found[name] = kind(folder / name, (_read(of_sample) for of_sample in ranges))
    return found


def _options(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0}


def _webdataset(folder: Path, records: Iterable[Record]) -> Callable[[Collate, int], Iterable[MicroBatch]]:
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=64, verbose=0) as writer:
        for i, record in enumerate(records):
            arrays = {f"{name}.npy": value for name, value in record.items() if name not in ("jpg", "json")}
            writer.write({"__key__": f"{i:05}", "jpg": record["jpg"], "json": record["json"], **arrays})
    urls = sorted(map(str, folder.glob("*.tar")))

    def parse(sample: dict[str, Any]) -> Record:
        arrays = {name[:-4]: np.load(io.BytesIO(data)) for name, data in sample.items() if name.endswith(".npy")}
        return {"jpg": sample["jpg"], "json": sample["json"], **arrays}

    def opened(collate: Collate, workers: int) -> Iterable[MicroBatch]:
        data = webdataset.WebDataset(urls, shardshuffle=False).map(parse).batched(BATCH, collation_fn=collate)
        return DataLoader(data, batch_size=None, **_options(workers))

    return opened


def _litdata(folder: Path, records: Iterable[Record]) -> Callable[[Collate, int], Iterable[MicroBatch]]:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for i, record in enumerate(records):
        writer[i] = record
    writer.done()
    writer.merge()

    def opened(collate: Collate, workers: int) -> Iterable[MicroBatch]:
        data = litdata.StreamingDataset(str(folder))
        loader: Any = litdata.StreamingDataLoader(data, batch_size=BATCH, collate_fn=collate, **_options(workers))
        return cast(Iterable[MicroBatch], loader)

    return opened


def _streaming(folder: Path, records: Iterable[Record]) -> Callable[[Collate, int], Iterable[MicroBatch]]:
    import streaming

    first, *rest = records
    columns = {name: "bytes" if isinstance(value, bytes) else "ndarray" for name, value in first.items()}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for record in (first, *rest):
            writer.write(record)

    def opened(collate: Collate, workers: int) -> Iterable[MicroBatch]:
        data = streaming.StreamingDataset(local=str(folder), batch_size=BATCH, shuffle=False)
        return DataLoader(data, batch_size=BATCH, collate_fn=collate, **_options(workers))

    return opened


# ---- measuring


def _check_same(sides: dict[str, Side]) -> None:
    """Raise if two sides give other samples; this is also what warms disk and worker processes up."""
    expected: set[str] = set()
    for name, side in sides.items():
        found = {digest for batch in side() for digest in _digests(batch)}
        expected = expected or found
        if found != expected or len(found) != SAMPLES:  # worker processes take turns, so in whatever order
            raise OlaError(f"loaders: {name} gives other samples than ours")


def _digests(batch: MicroBatch) -> list[str]:
    """A hash of everything there is of each sample, but for padding; they have one image each."""
    rows = []
    for i, mask in enumerate(batch.attention_mask.bool()):
        own = [batch.input_ids[i][mask], batch.labels[i][mask], batch.pixel_values[i]]
        for targets in batch.targets.values():
            own += [targets.values[i], *([] if targets.scales is None else [targets.scales[i]])]
        rows.append(content_hash(b"".join(tensor.numpy().tobytes() for tensor in own)))
    return rows


def _rates(sides: dict[str, Side]) -> dict[str, float]:
    """Median samples per second; one pass of each after the other, so that a drifting machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            start = time.perf_counter()
            for _ in side():
                pass
            seconds[name].append(time.perf_counter() - start)
    return {name: SAMPLES / statistics.median(values) for name, values in seconds.items()}


def _versions(names: Iterable[str]) -> dict[str, str]:
    return {name: version({"streaming": "mosaicml-streaming"}.get(name, name)) for name in names}


def _chunk(step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(step * BATCH, (step + 1) * BATCH)


def _ranges(snapshot: Snapshot, tasks: tuple[str, ...], number: int) -> list[Any]:
    """Every part of a sample: name, file, offset, bytes, and dtype and shape where it is an array."""
    sample = snapshot.sample(number)
    (image,) = sample.images
    tar = snapshot.corpora["all"].tar_path(sample.tar)
    found: list[Any] = [
        ("jpg", tar, image.offset, image.bytes, None, None),
        ("json", tar, sample.text_offset, sample.text_bytes, None, None),
    ]
    for task in tasks:
        target, row = snapshot.targets["all"][task], image.targets[task]
        assert row is not None, "every image has every target"
        of, block = target.identity.layout, row["block"]
        found.append((task, target.values_file(block), row["values_offset"], row["values_bytes"], of.dtype, of.shape))
        if of.scales_dtype:
            where = target.scales_file(block), row["scales_offset"], row["scales_bytes"]
            found.append((f"{task}.scales", *where, of.scales_dtype, of.scales_shape))
    return found


def _read(ranges: list[Any], descriptors: dict[Any, int] | None = None) -> Record:
    """The parts of a sample, unchecked."""
    record: Record = {}
    for name, path, offset, count, dtype, shape in ranges:
        if descriptors is None:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), count, offset)
        else:
            data = os.pread(descriptors[path], count, offset)
        record[name] = data if dtype is None else np.frombuffer(data, dtype).reshape(shape)
    return record


# ---- the samples


def _store(folder: Path) -> PipelineConfig:
    """A corpus of crops from photographs, and a store of random targets of the published size."""
    images = folder / "images"
    images.mkdir(parents=True)
    source = folder / "photos"
    photos = json.loads(write_llava_json(source).read_text())
    rng = np.random.default_rng(0)
    entries = []
    for i in range(SAMPLES):
        photo = photos[i % len(photos)]
        with Image.open(source / photo["image"]) as image:
            left, top = rng.random(2) * 0.3
            box = (left * image.width, top * image.height, (left + 0.7) * image.width, (top + 0.7) * image.height)
            image.convert("RGB").resize((448, 336), Image.Resampling.BICUBIC, box).save(images / f"{i}.jpg", quality=90)
        turns = photo["conversations"][:2]
        entries.append({"conversations": turns, "id": f"{i:05}", "image": f"{i}.jpg"})
    (folder / "samples.json").write_text(json.dumps(entries))
    pack_llava_json(folder / "samples.json", [images], folder / "corpus", samples_per_tar=64)
    data = f"data={{all: {{corpus: {folder}/corpus, targets: {folder}/targets}}}}"
    config = load_pipeline("llava558k-llama3-8b", [f"run_dir={folder}", data, "stages={}", "probe=null", "eval=null"])
    for task in config.teachers:
        _commit(config, task, rng)
    return config


def _commit(config: PipelineConfig, task: str, rng: np.random.Generator) -> None:
    """Normal features for every image of the corpus, as if the task's teacher had made them."""
    corpus, stated = Corpus.open(config.data["all"].corpus), config.teachers[task]
    keys = ("teacher", "weights", "revision", "view", "input_size", "grid", "width", "codec")
    shared: dict[str, Any] = {key: getattr(stated, key) for key in keys}
    layers = None if stated.layers is None else tuple(stated.layers)
    unknown: dict[str, Any] = dict.fromkeys(
        ("weights_hash", "preprocessing", "position_embedding", "pooling"), "random"
    )
    identity = Identity(task=task, compute_dtype=stated.dtype, layers=layers, **shared, **unknown)
    target = TargetStore.create(str(config.data["all"].targets), corpus.id).add(identity, block=64)
    features = rng.standard_normal((1, stated.tokens, stated.width), np.float32)
    blocks = tar_blocks(corpus.tars, target.block)
    for tar in corpus.tars:
        writer = TarWriter.open(target, tar, blocks[tar.name])
        assert writer is not None, "a fresh store is nobody's"
        with writer:
            for row in corpus.index(tar).to_pylist():
                features = np.roll(features, 1)
                values, scales = codec.encode(features, stated.codec)
                scale = None if scales is None else scales[0]
                writer.add(row["key"], row["image_index"], row["image_hash"], values[0], scale, 1.0, 3.0)
            writer.commit()


def _processor() -> OlaVlmProcessor:
    """The demo student's, for images of the published size."""
    _, small = student.create(load_pipeline("demo"))
    return OlaVlmProcessor(small.image_processor, small.tokenizer, "squash", SIZE, 576, small.task_tokens)
