"""The corpus stage: every corpus of a pipeline, and the demo world's benchmark."""

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from featurize.corpus import build as build_from_source
from featurize.corpus.cli import print_report, progress_bar
from featurize.corpus.pack import pack_llava_json
from olavlm import runs
from olavlm.config import BenchmarkSource, DataConfig, DemoWorldSource, PhotosSource, PipelineConfig
from olavlm.data.corpus import Corpus, content_hash
from olavlm.data.objects import as_path, local_path
from olavlm.errors import OlaError
from olavlm.eval import cv_bench
from pipelines.demo_world.build import build_benchmark, build_split
from pipelines.photos.photos import write_llava_json


def build(config: PipelineConfig) -> None:
    """Render, pack or adopt what is not there yet, the benchmark first; ``corpus/summary.json`` tells what is there.

    Raises:
        OlaError: a corpus without a `source` that is not there either.
    """
    folder = runs.stage_dir(config, "corpus")
    if runs.begin(folder, runs.depends_on(config, "corpus")):
        return
    if config.eval and config.eval.scenes and config.eval.cv_bench:
        benchmark = Path(config.eval.cv_bench)
        if not (benchmark / "baselines.json").exists():
            build_benchmark(config.eval.scenes, benchmark, config.seed, level=config.eval.level)
    summary: dict[str, dict[str, Any]] = {}
    for name, data in config.data.items():
        _build_one(name, data, config.seed)
        corpus = Corpus.open(data.corpus)
        summary[name] = {
            "id": corpus.id,
            "tars": len(corpus.tars),
            "samples": sum(tar.samples for tar in corpus.tars),
            "images": sum(tar.images for tar in corpus.tars),
            "bytes": sum(tar.bytes for tar in corpus.tars),
        }
    table = Table("corpus", "tars", "samples", "images", "MB", title=None)
    for name, row in summary.items():
        table.add_row(name, *(f"{row[k]:,}" for k in ("tars", "samples", "images")), f"{row['bytes'] / 1e6:.1f}")
    Console().print(table)
    runs.finish(folder, {"corpora": summary})


def _build_one(name: str, data: DataConfig, seed: int) -> None:
    """One corpus from its source; what is no file of LLaVA's or WebDataset's is written as LLaVA JSON and packed."""
    source = data.source
    if source is None:
        if not (as_path(data.corpus) / "corpus.json").exists():
            raise OlaError(f"data.{name}.corpus: no corpus in {data.corpus} and no source to make it from")
        return
    out = local_path(data.corpus)
    if isinstance(source, DemoWorldSource | PhotosSource | BenchmarkSource):
        raw = out.with_name(out.name + ".images")
        match source:
            case DemoWorldSource():
                json_file = _render(name, source, raw, seed)
            case PhotosSource():
                json_file = write_llava_json(raw)
            case BenchmarkSource():
                json_file = _write_benchmark_images(source.folder, raw)
        with progress_bar(f"packing {name}") as progress:
            report = pack_llava_json(json_file, [raw], out, source.samples_per_tar, progress)
        shutil.rmtree(raw)
    else:
        with progress_bar(f"corpus {name}") as progress:
            report = build_from_source(source, out, progress)
    print_report(report)


def _write_benchmark_images(folder: str, out: Path) -> Path:
    """The images of a benchmark as LLaVA JSON, each once, called by its hash; the text names the questions about it.

    No question and no answer is in it: a benchmark is nothing to train on.
    """
    asked = cv_bench.load(folder)
    out.mkdir(parents=True, exist_ok=True)
    questions: dict[str, list[str]] = {}
    for question in asked:
        key = content_hash(question.image)
        (out / key).write_bytes(question.image)
        questions.setdefault(key, []).append(question.id)
    rows = [
        {
            "id": key,
            "image": key,
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " ".join(ids)}],
        }
        for key, ids in questions.items()
    ]
    file = out / "benchmark.json"
    file.write_text(json.dumps(rows))
    return file


def _render(name: str, source: DemoWorldSource, out: Path, seed: int) -> Path:
    """The demo world's split as LLaVA JSON, with a progress bar."""
    with progress_bar(f"rendering {name}") as progress:
        rendered = 0

        def advance(scenes: int) -> None:
            nonlocal rendered
            rendered += scenes
            progress(rendered, source.scenes, "scenes")

        return build_split(source.split, source.scenes, out, seed, progress=advance, level=source.level)
