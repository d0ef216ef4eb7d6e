"""The corpus stage: every corpus of a pipeline, and the demo world's benchmark."""

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from featurize.corpus import build as build_from_source
from featurize.corpus.pack import pack_llava_json
from olavlm import runs
from olavlm.config import DataConfig, DemoWorldSource, PhotosSource, PipelineConfig
from olavlm.data.corpus import Corpus
from olavlm.errors import OlaError
from pipelines.demo_world.build import build_benchmark, build_split
from pipelines.photos.photos import write_llava_json


def build(config: PipelineConfig) -> None:
    """Render, pack or adopt what is not there yet; ``corpus/summary.json`` tells what every corpus holds.

    Raises:
        OlaError: a corpus without a `source` that is not there either.
    """
    folder = runs.stage_dir(config, "corpus")
    if runs.begin(folder, runs.depends_on(config, "corpus")):
        return
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
    if config.eval and config.eval.scenes and not (Path(config.eval.cv_bench) / "baselines.json").exists():
        build_benchmark(config.eval.scenes, Path(config.eval.cv_bench), seed=config.seed)
    table = Table("corpus", "tars", "samples", "images", "MB", title=None)
    for name, row in summary.items():
        table.add_row(name, *(f"{row[k]:,}" for k in ("tars", "samples", "images")), f"{row['bytes'] / 1e6:.1f}")
    Console().print(table)
    runs.finish(folder, {"corpora": summary})


def _build_one(name: str, data: DataConfig, seed: int) -> None:
    """One corpus from its source; the worlds that ship with the repository are written as LLaVA JSON and packed."""
    out, source = Path(data.corpus), data.source
    if source is None:
        if not (out / "corpus.json").exists():
            raise OlaError(f"data.{name}.corpus: no corpus in {out} and no source to make it from")
        return
    if not isinstance(source, DemoWorldSource | PhotosSource):
        build_from_source(source, out)
        return
    raw = out.with_name(out.name + ".images")
    if isinstance(source, DemoWorldSource):
        json_file = build_split(source.split, source.scenes, raw, seed)
    else:
        json_file = write_llava_json(raw)
    pack_llava_json(json_file, [raw], out, source.samples_per_tar)
    shutil.rmtree(raw)
