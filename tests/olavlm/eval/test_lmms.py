"""The plugin under the installed lmms-eval, on a small task of its own, through lmms-eval's command line.

lmms-eval lives in an environment of its own (README, "More benchmarks"); elsewhere these tests are skipped.
"""

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from olavlm.eval.generate import Request, generate_replies

pytestmark = [
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval has an environment of its own"),
    pytest.mark.timeout(900),  # lmms-eval imports for a minute
]

TASK = """
task: tiny
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {0}/tiny.parquet}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 6, temperature: 0, until: [table], image_aspect_ratio: original}}
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
import io
from PIL import Image

def visual(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")] if doc["image"] else []

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, replies):
    return {"same": float(replies[0] == doc["answer"])}
"""


@pytest.fixture
def task(tmp_path: Path, tiny_student: tuple[Any, Any]) -> tuple[Path, list[str]]:
    """A task whose right answers are what the student says to our own evaluation; and those answers."""
    torch.set_num_threads(1)
    model, processor = tiny_student
    for part in tiny_student:
        part.save_pretrained(tmp_path / "model")
    rows, requests = [], []
    for i in range(7):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (i * 35, 20, 200)).save(buffer, "PNG")
        rows.append({"image": buffer.getvalue(), "question": "How many ?" + " chair" * (i % 4)})
        requests.append(Request(str(i), f"<image>\n{rows[-1]['question']}", buffer.getvalue()))
    lines = generate_replies(model, processor, requests, tmp_path / "ours.jsonl", batch=3, max_new_tokens=6)
    answers = [line["reply"].split("table")[0].strip() for line in lines]
    rows = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
    rows.append({"image": b"", "question": "How many table ?", "answer": "whatever is said without a picture"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tiny.parquet")
    (tmp_path / "tiny.yaml").write_text(TASK.format(tmp_path))
    (tmp_path / "utils.py").write_text(UTILS)
    return tmp_path, answers


def lmms_eval(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """lmms-eval's command line, without network."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "lmms_eval", "--model", "olavlm", "--tasks", "tiny", "--include_path", str(folder)]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, cwd=folder)


def test_what_lmms_eval_hears_is_what_we_hear(task: tuple[Path, list[str]]) -> None:
    """Seven right answers, and one question without a picture, to which none is right."""
    folder, answers = task
    out = folder / "out"
    run = lmms_eval(
        folder,
        *("--model_args", f"pretrained={folder / 'model'}", "--batch_size", "3"),
        *("--output_path", str(out), "--log_samples"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (results,) = out.rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["tiny"]["same,none"] == 7 / 8
    (samples,) = out.rglob("*_samples_tiny.jsonl")
    found = {line["doc_id"]: line for line in map(json.loads, samples.read_text().splitlines())}
    assert [found[i]["filtered_resps"] for i in range(7)] == answers
    assert len(set(answers)) > 1
