"""The multi-encoder pipeline as it ships, from rendered scenes to scores; with few scenes and one step a stage."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from featurize.stage import run_pipeline
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data.corpus import Corpus, content_hash, conversation
from olavlm.errors import OlaError
from pipelines import corpus as corpora
from pipelines.evaluate import evaluate
from train import stage

SCENES = [f"data.{name}.source.scenes=8" for name in ("pretrain", "finetune")]
STEPS = [f"stages.{name}.max_steps=1" for name in ("pretrain", "finetune")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def shipped(tmp_path: Path, benchmark: list[dict[str, Any]]) -> PipelineConfig:
    """With the benchmark that a user has, instead of a rendered one; its last question is about the first's image."""
    benchmark[-1]["image"] = benchmark[0]["image"]
    file = tmp_path / "cv_bench" / "test_3d.parquet"
    pq.write_table(pa.Table.from_pylist(benchmark[12:]), file)
    overrides = [f"run_dir={tmp_path}", f"eval.cv_bench={tmp_path}/cv_bench", "eval.scenes=null", "eval.batch=8"]
    return load_pipeline("multi-encoder", [*overrides, *SCENES, *STEPS, "featurize.executor=inprocess"])


def test_from_scenes_to_scores(shipped: PipelineConfig, tmp_path: Path, benchmark: list[dict[str, Any]]) -> None:
    corpora.build(shipped)
    corpus = Corpus.open(tmp_path / "corpus" / "benchmark")
    rows = [row for tar in corpus.tars for row in corpus.index(tar).to_pylist()]
    images = {content_hash(row["image"]["bytes"]) for row in benchmark}
    assert len(images) == len(benchmark) - 1
    assert sorted(row["key"] for row in rows) == sorted(images)
    assert all(row["key"] == row["image_hash"] for row in rows)
    said = [conversation("json", corpus.read(corpus.tars[0], row["text_offset"], row["text_bytes"])) for row in rows]
    assert [turns[1]["value"] for turns in said][:2] == ["2D/0 3D/23", "2D/1"]  # and no answer
    run_pipeline(shipped)
    stage.run(shipped, "pretrain")
    stage.run(shipped, "finetune")
    evaluate(shipped)
    folder = tmp_path / "evaluate"
    assert json.loads((folder / "cv_bench" / "scores.json").read_text())["questions"] == len(benchmark)
    assert len((folder / "cv_bench" / "replies.jsonl").read_text().splitlines()) == len(benchmark)

    pinned = tmp_path / "finetune" / "snapshot.json"
    content = json.loads(pinned.read_text())
    content["data"]["finetune"]["targets"]["depth"] = "depth-of-another-teacher"
    pinned.write_text(json.dumps(content))
    (folder / "done.json").unlink()
    with pytest.raises(
        OlaError, match=r"not the depth teacher that finetune was trained with, .* has depth-of-another"
    ):
        evaluate(shipped)
