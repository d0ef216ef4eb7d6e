"""How fast a corpus is featurized, against other ways on the same cores; what they compute is checked to be equal.

    published    the demo's teachers the published way: each alone, one image at a time, through its full processor
    ray data     the same teachers as a competent user of Ray Data would run them: decode, preprocess, forward in
                 batches in ``map_batches``, fp16 features to Parquet
    bare         one larger teacher (Depth-Anything-V2-Small's architecture) on tensors in memory, stored nowhere
    tars         the same images per tar, and 1, 10 and 100 tars

The other side never pays for what it leaves out: checking bytes, quantizing, checksums, fsync and commits are in our
seconds only.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)

from featurize import teachers
from featurize.corpus.adopt import adopt
from featurize.job import executor
from featurize.stage import Job, open_jobs, status
from featurize.worker import Worker
from olavlm.config import PipelineConfig, TeacherConfig, load_pipeline
from olavlm.data import codec
from olavlm.data.corpus import Corpus
from olavlm.data.images import decode_image
from olavlm.data.targets import Identity
from olavlm.errors import OlaError
from pipelines import corpus as corpora

RUNS = 3  # of each side, taken in turn; the best is reported: whatever else the machine does only adds
BATCH = 32
WORKERS = 2
TARS = (1, 10, 100)

Features = dict[tuple[str, str], Tensor]  # by task and sample key: (tokens, width) float32


def throughput(folder: Path) -> dict[str, Any]:
    """Run all four; corpora and stores go below `folder`, and the corpora stay there for the next time."""
    small = _pipeline(folder / "small", scenes=256, samples_per_tar=128)
    large = _pipeline(folder / "large", scenes=2000, samples_per_tar=125)
    many = _pipeline(folder / "many", scenes=500, samples_per_tar=5)
    for config in (small, large, many):
        corpora.build(config)
    return {
        "published": _against_published(small),
        "ray_data": _against_ray_data(large),
        "bare": _against_bare_forward(small, folder / "depth-small"),
        "tars": _by_tars(many, folder),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The ratios as a table."""
    table = Table(
        "featurizing", "ms / image", "the other way", "ratio", "cores", title="a corpus, stored and committed"
    )
    for name, title in (
        ("published", "one image at a time, full processors"),
        ("ray_data", "Ray Data map_batches to Parquet"),
        ("bare", f"bare forward ({result['bare']['forward_share']:.0f} × all else)"),
    ):
        row = result[name]
        ours, other = (1e3 * row[side] / row["images"] for side in ("ours", "other"))
        table.add_row(title, f"{ours:.2f}", f"{other:.2f}", f"{other / ours:.2f}", str(row["cores"]))
    console.print(table)
    costs = ", ".join(f"{tars}: {1e3 * seconds:.2f} ms" for tars, seconds in result["tars"].items())
    console.print(f"per image in a corpus of so many tars of 5: {costs}", highlight=False)
    gap = max(result[name]["gap"] for name in ("published", "ray_data"))
    console.print(f"features differ from the other ways' by {gap:.2f} quantization steps at most", highlight=False)


# ---- the four


def _against_published(config: PipelineConfig) -> dict[str, Any]:
    """One core: a worker of ours | for each teacher, for each image: open, process, forward."""
    identities = _identities(config)
    worker = Worker(config.teachers, config.featurize, identities)
    features: Features = {}
    processors = {task: _processor(stated) for task, stated in config.teachers.items()}

    def published() -> None:
        (job,) = open_jobs(config, identities)
        for task, teacher in worker.teachers.items():
            for key, data in _images(job.corpus):
                pixels = processors[task](decode_image(data))
                features[task, key] = teacher.encode(pixels)[0]

    seconds = _best({"ours": partial(_run, worker, config, identities), "other": published}, cores=1)
    images = sum(tar.images for tar in Corpus.open(config.data["all"].corpus).tars)
    return {**seconds, "images": images, "cores": 1, "gap": _gap(config, features)}


def _against_ray_data(config: PipelineConfig) -> dict[str, Any]:
    """The same cores: seconds of the whole corpus less those of its first tars, so that no side's start-up counts."""
    import ray

    identities = _identities(config)
    corpus = Corpus.open(config.data["all"].corpus)
    tars = [str(corpus.tar_path(tar)) for tar in corpus.tars]
    out = Path(config.run_dir) / "parquet"

    def ours(count: int) -> None:
        job = _empty(config, identities)
        with executor(config.teachers, config.featurize, identities, print) as pool:
            for _ in pool.run(job.missing()[:count]):
                pass

    def ray_data(count: int) -> None:
        shutil.rmtree(out, ignore_errors=True)
        data = ray.data.read_webdataset(tars[:count], suffixes=["png"], decoder=None)
        stated = {"teachers": config.teachers}
        data.map_batches(
            _Featurize, fn_constructor_kwargs=stated, batch_size=BATCH, concurrency=WORKERS, num_cpus=1
        ).write_parquet(str(out))

    whole, start = len(tars), WORKERS
    session = tempfile.mkdtemp(prefix="bench-ray-")
    with only_cores(WORKERS):
        # Reading and writing tasks of Ray Data want CPUs besides its actors'.
        ray.init(
            num_cpus=2 * WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=session,
        )
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            sides = ours, ray_data
            seconds = _best({(side, n): partial(side, n) for side in sides for n in (start, whole)})
            features = _from_parquet(out, config)
        finally:
            ray.shutdown()
            shutil.rmtree(session, ignore_errors=True)
    return {
        "ours": seconds[ours, whole] - seconds[ours, start],
        "other": seconds[ray_data, whole] - seconds[ray_data, start],
        "images": sum(tar.images for tar in corpus.tars[start:]),
        "cores": WORKERS,
        "gap": _gap(config, features),
    }


class _Featurize:
    """What a user of Ray Data writes."""

    def __init__(self, teachers: dict[str, TeacherConfig]):
        torch.set_num_threads(1)
        self._teachers = _load(teachers)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = [decode_image(data) for data in batch["png"]]
        found: dict[str, Any] = {"key": batch["__key__"]}
        for task, teacher in self._teachers.items():
            features = teacher.encode(torch.stack([teacher.preprocess(image) for image in images]))
            found[task] = features.half().numpy()
        return found


def _against_bare_forward(config: PipelineConfig, weights: Path) -> dict[str, Any]:
    """One core, a teacher whose forward pass dwarfs the rest: a worker of ours | its batches, ready in memory."""
    _save_depth_small(weights)
    stated = TeacherConfig(
        teacher="depth_anything", weights=str(weights), input_size=224, grid=16, width=384, batch_size=8
    )
    only_first = Path(config.run_dir) / "first"
    corpus = Corpus.open(config.data["all"].corpus)
    if not (only_first / "corpus.json").exists():
        adopt([corpus.tar_path(corpus.tars[0])], only_first)
    data = {"all": config.data["all"].model_copy(update={"corpus": str(only_first)})}
    config = config.model_copy(update={"teachers": {"depth": stated}, "data": data})
    identities = _identities(config)
    worker = Worker(config.teachers, config.featurize, identities)
    teacher = worker.teachers["depth"]
    pixels = torch.stack([teacher.preprocess(decode_image(data)) for _, data in _images(Corpus.open(only_first))])
    batches = torch.split(pixels, stated.batch_size)

    def bare() -> None:
        for batch in batches:
            teacher.encode(batch)

    ours = partial(_run, worker, config, identities)
    seconds = _best({"ours": ours, "other": bare}, cores=1)
    ready = teacher.encode(batches[0])
    setattr(teacher, "encode", lambda _: ready)  # noqa: B010  what is left is everything but the forward pass
    rest = _best({"rest": ours}, cores=1)["rest"]
    return {**seconds, "images": len(pixels), "cores": 1, "forward_share": seconds["other"] / rest}


def _by_tars(config: PipelineConfig, folder: Path) -> dict[int, float]:
    """Seconds per image of a whole job (look for what is missing, run, count) in corpora of 1, 10 and 100 tars."""
    corpus = Corpus.open(config.data["all"].corpus)
    identities = _identities(config)
    worker = Worker(config.teachers, config.featurize, identities)
    sides: dict[int, Callable[[], None]] = {}
    for count in TARS:
        part = folder / f"tars-{count}"
        if not (part / "corpus" / "corpus.json").exists():
            adopt([corpus.tar_path(tar) for tar in corpus.tars[:count]], part / "corpus")
        data = {"all": config.data["all"].model_copy(update={"corpus": f"{part}/corpus", "targets": f"{part}/targets"})}
        sides[count] = partial(_run, worker, config.model_copy(update={"data": data}), identities)
    seconds = _best(sides, cores=1)
    images = corpus.tars[0].images
    return {count: seconds[count] / count / images for count in TARS}


# ---- what they share


def _pipeline(folder: Path, scenes: int, samples_per_tar: int) -> PipelineConfig:
    """The demo's teachers over one corpus of the demo world."""
    source = f"{{kind: demo_world, split: pretrain, scenes: {scenes}, samples_per_tar: {samples_per_tar}}}"
    data = f"data={{all: {{corpus: {folder}/corpus, targets: {folder}/targets, source: {source}}}}}"
    return load_pipeline(
        "demo",
        [f"run_dir={folder}", data, "stages={}", "probe=null", "probe_tasks=null", "eval=null"]
        + [f"featurize.workers={WORKERS}"]
        + [f"teachers.{task}.batch_size={BATCH}" for task in ("depth", "seg", "gen")],
    )


def _identities(config: PipelineConfig) -> dict[str, Identity]:
    return {task: teacher.identity(task) for task, teacher in _load(config.teachers).items()}


def _load(stated: dict[str, TeacherConfig]) -> dict[str, Any]:
    return {task: teachers.load(teacher) for task, teacher in stated.items()}


def _empty(config: PipelineConfig, identities: dict[str, Identity]) -> Job:
    """The pipeline's one job, with nothing committed."""
    shutil.rmtree(str(config.data["all"].targets), ignore_errors=True)
    (job,) = open_jobs(config, identities)
    return job


def _run(worker: Worker, config: PipelineConfig, identities: dict[str, Identity]) -> None:
    """Everything from an empty store to a full one."""
    job = _empty(config, identities)
    for unit in job.missing():
        worker.run(unit)
    for task in job.sets:
        if status(job, task)["missing"]:
            raise OlaError(f"{job.data.targets}: targets are missing after the run")


def _images(corpus: Corpus) -> Iterator[tuple[str, bytes]]:
    """Key and encoded bytes of every image."""
    for tar in corpus.tars:
        for row in corpus.index(tar).to_pylist():
            yield row["key"], corpus.read(tar, row["image_offset"], row["image_bytes"])


def _processor(stated: TeacherConfig) -> Callable[[Any], Tensor]:
    """An image as a batch of one, by the checkpoint's own processor."""
    folder = Path(stated.weights)
    if stated.teacher == "oneformer":
        both: Any = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
        return lambda image: both(images=image, task_inputs=["semantic"], return_tensors="pt")["pixel_values"]
    folder = folder / "feature_extractor" if stated.teacher == "unclip" else folder
    processor: Any = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"]


def _from_parquet(folder: Path, config: PipelineConfig) -> Features:
    """What `_Featurize` wrote."""
    from ray.data import read_parquet

    features: Features = {}
    for rows in read_parquet(str(folder)).iter_batches(batch_size=None):
        for task in config.teachers:
            found = zip(rows["key"], rows[task], strict=True)
            features |= {(task, str(key)): torch.from_numpy(np.array(value)).float() for key, value in found}
    return features


def _gap(config: PipelineConfig, features: Features) -> float:
    """The largest difference between these features and the store's, in quantization steps of the store.

    Raises:
        OlaError: it is more than one step, or an image is on one side only.
    """
    (job,) = open_jobs(config)
    largest, compared = 0.0, 0
    for task, target in job.sets.items():
        for tar in job.corpus.tars:
            commit = target.commit(tar)
            assert commit is not None, "the run was checked"
            for row in commit.to_pylist():
                stored, scales = target.read(row, row["key"])
                decoder = None if scales is None else torch.tensor(scales)
                value = codec.decode(torch.tensor(stored), decoder, target.identity.codec)
                step = (value.abs() * 2.0**-10).clamp(min=1e-6) if decoder is None else decoder[:, None]
                largest = max(largest, float(((value - features[task, row["key"]]).abs() / step).max()))
                compared += 1
    if largest > 1 or compared != len(features):
        raise OlaError(f"{job.data.targets}: {largest:.2f} steps from {len(features)} features of the other way")
    return largest


def _best(sides: dict[Any, Callable[[], None]], cores: int | None = None) -> dict[Any, float]:
    """Least seconds of each side; one run of each after the other, on so many cores (default: as it is)."""
    seconds = dict.fromkeys(sides, float("inf"))
    with only_cores(cores or len(os.sched_getaffinity(0))):
        for _ in range(RUNS):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


@contextmanager
def only_cores(count: int) -> Iterator[None]:
    """This thread, and whatever it starts, on the first `count` of its cores; torch on one thread each."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(allowed)[:count])
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def _save_depth_small(folder: Path) -> None:
    """Depth-Anything-V2-Small's architecture with random weights, in its repository's layout."""
    backbone = Dinov2Config(  # type: ignore[call-arg]
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518,
        out_indices=[3, 6, 9, 12], reshape_hidden_states=False,
    )  # fmt: skip
    neck = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    DepthAnythingForDepthEstimation(neck).save_pretrained(folder)
    shutil.copy(Path("pipelines/demo_world/weights/depth") / "preprocessor_config.json", folder)
