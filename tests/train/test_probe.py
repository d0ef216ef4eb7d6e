"""Per-layer probes on frozen students."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olavlm import runs
from olavlm.data.images import decode_image
from olavlm.data.targets import TargetStore
from olavlm.errors import OlaError
from olavlm.model import cosine
from train import student as students
from train.probe import COSINES, Probed, _check_alike, mean_targets, paired, probe, split
from train.stage import run

FAILED = "s05"  # its image has no depth target


@given(samples=st.integers(2, 2000), held_out=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_the_split_is_disjoint_and_complete(samples: int, held_out: float, seed: int) -> None:
    train, held = split(samples, held_out, seed)
    assert sorted(np.concatenate([train, held])) == list(range(samples))
    assert len(train) > 0
    assert len(held) > 0
    assert abs(len(held) - held_out * samples) <= 1


def test_every_student_layer_and_task_is_probed_on_the_same_images(world: Any, tmp_path: Path) -> None:
    config = world.config(f"run_dir={tmp_path}", "stages.pretrain.max_steps=1")
    with pytest.raises(OlaError, match="pretrain has not finished"):
        probe(config)
    run(config, "pretrain")
    probe(config)
    result = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert list(result["students"]) == ["initial", "pretrain"]
    table = pq.read_table(tmp_path / "probe" / "cosines.parquet")
    assert table.schema == COSINES
    rows = table.to_pandas()
    for name, means in result["students"].items():
        assert {task: list(layers) for task, layers in means.items()} == {"depth": ["1", "2"], "gen": ["1", "2"]}
        for task, layer in (("depth", 1), ("gen", 2)):
            of = rows[(rows.student == name) & (rows.task == task) & (rows.layer == layer)]
            cell = means[task][str(layer)]
            assert cell["value"] == pytest.approx(of.cosine.mean())
            assert of.cosine.min() <= cell["low"] < cell["value"] < cell["high"] <= of.cosine.max()
            assert len(set(of.key)) == len(of) == len(rows[(rows.student == name) & (rows.task == task)]) / 2
    assert result["students"]["initial"] != result["students"]["pretrain"]
    assert set(result["floor"]) == {"depth", "gen"}
    assert (result["held_out"], result["level"]) == (5, 0.95)
    _, held_out = split(24, 0.2, config.seed)
    keys = {f"s{i:02}.{j}" for i in held_out for j in range(0 if i % 8 == 3 else 2 if i % 7 == 6 else 1)}
    assert {key.rpartition("/")[2] for key in rows[rows.task == "gen"].key} == keys
    assert {key.rpartition("/")[2] for key in rows[rows.task == "depth"].key} == {k for k in keys if FAILED not in k}
    differences = rows[(rows.task == "gen") & (rows.layer == 1)].pivot(index="key", columns="student", values="cosine")
    more = paired(table, "pretrain", "initial", "gen", 1)
    assert more.value == pytest.approx((differences.pretrain - differences.initial).mean())
    done = runs.finished(tmp_path / "probe")
    assert done is not None
    assert done["students"] == result["students"]


def test_a_probe_goes_on_with_the_students_that_are_missing(world: Any, tmp_path: Path) -> None:
    one = world.config(f"run_dir={tmp_path}/a", "probe.students=[initial]")
    probe(one)
    probe(world.config(f"run_dir={tmp_path}/b", "probe.students=[initial]"))
    first, second = (json.loads((tmp_path / name / "probe" / "probe.json").read_text()) for name in "ab")
    assert first == second  # a function of the seed
    (tmp_path / "a" / "probe" / "done.json").unlink()
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    marked = first | {"students": {"initial": {task: {"1": cell, "2": cell} for task in ("depth", "gen")}}}
    (tmp_path / "a" / "probe" / "probe.json").write_text(json.dumps(marked))
    probe(one)
    assert json.loads((tmp_path / "a" / "probe" / "probe.json").read_text()) == marked


def test_two_do_not_probe_in_one_folder(world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    with runs.alone(folder), pytest.raises(OlaError, match="probe: another process is at work in this folder"):
        probe(world.config(f"run_dir={tmp_path}", "probe.students=[initial]"))
    assert [file.name for file in folder.iterdir()] == [".lock"]


def test_probes_learn(own_world: Any, tmp_path: Path, commit: Callable[..., Any]) -> None:
    """All images share one target: the mean target is perfect, and a trained probe comes near it."""
    shutil.rmtree(own_world.folder / "targets")
    for task, teacher in own_world.config().teachers.items():
        commit(own_world, task, teacher, constant=True)
    overrides = [f"run_dir={tmp_path}", "probe.students=[initial]", "probe.steps=60", "probe.lr=0.01"]
    probe(own_world.config(*overrides))
    result = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert all(cell["value"] == pytest.approx(1, abs=1e-3) for cell in result["floor"].values())
    cells = [cell for layers in result["students"]["initial"].values() for cell in layers.values()]
    assert all(cell["value"] > 0.7 for cell in cells)


def test_a_limit_on_the_text_leaves_an_image_its_room(world: Any, tmp_path: Path) -> None:
    """An image alone has 20 tokens; of two, the first is probed."""
    probe(world.config(f"run_dir={tmp_path}", "probe.students=[initial]", "probe.steps=1", "probe.max_length=19"))
    table = pq.read_table(tmp_path / "probe" / "cosines.parquet").to_pandas()
    _, held_out = split(24, 0.2, world.config().seed)
    found = {key.rpartition("/")[2] for key in table[table.task == "gen"].key}
    assert found == {f"s{i:02}.0" for i in held_out if i % 8 != 3}


def test_trained_probes_predict_as_they_did_whatever_a_sample_says_of_its_image(world: Any, tmp_path: Path) -> None:
    """Loaded again, on the bare images, they give the cosines that were kept: no caption was read."""
    config = world.config(f"run_dir={tmp_path}", "probe.students=[initial]", "probe.tasks=[gen]")
    probe(config)
    found = Probed.load(config, "initial", torch.device("cpu"))
    rows = pq.read_table(tmp_path / "probe" / "cosines.parquet").to_pylist()
    of_layer = {row["key"]: row["cosine"] for row in rows if row["layer"] == 2}
    corpus, target = world.corpus(), TargetStore.open(f"{world.folder}/targets", world.corpus().id)
    target = target.find("gen", config.teachers["gen"])
    for tar in corpus.tars:
        for entry, row in zip(corpus.index(tar).to_pylist(), target.commit(tar).to_pylist(), strict=True):
            if (key := f"{tar.name}/{entry['key']}.{entry['image_index']}") not in of_layer:
                continue
            image = decode_image(corpus.read(tar, entry["image_offset"], entry["image_bytes"]))
            pixels = found.processor.pixel_values([image])
            predicted = {(task, layer): of for task, layer, of in found.predict(pixels, {})}
            stored = torch.from_numpy(target.read(row, entry["key"])[0].astype("float32"))[None]
            assert float(cosine(predicted["gen", "2"], stored)) == pytest.approx(of_layer.pop(key), abs=1e-5)
    assert not of_layer
    assert mean_targets(config)["gen"].shape == (1, 5)
    assert not list(found.predict(pixels[:0], {}))


def test_a_model_folder_stands_beside_if_it_is_of_the_same_kind(world: Any, tmp_path: Path) -> None:
    other = world.config(f"run_dir={tmp_path}/other", "seed=3")
    for part in students.create(other):
        part.save_pretrained(tmp_path / "there" / "model")
    folder = f"{tmp_path}/there/model"
    quick = [f"run_dir={tmp_path}/a", "probe.steps=1"]
    with pytest.raises(OlaError, match=r"'nowhere' is no model folder .* none of initial, pretrain, finetune"):
        probe(world.config(*quick, "probe.students=[nowhere]"))
    wider = "teachers.gen={teacher: some, weights: h, input_size: 32, grid: 1, width: 7, codec: fp16}"
    with pytest.raises(OlaError, match=r"predicts gen as 1 tokens of width 5, teachers\.gen gives 1 of width 7"):
        Probed.create(world.config(*quick, wider), folder, torch.device("cpu"))
    config = world.config(*quick, f"probe.students=[initial,{folder}]")
    probe(config)
    result = json.loads((tmp_path / "a" / "probe" / "probe.json").read_text())
    assert list(result["students"]) == ["initial", folder]
    one = Probed.load(config, folder, torch.device("cpu"))
    narrow = {"depth": {"1": {}}, "gen": {"1": {}}}
    with pytest.raises(OlaError, match="2 layers of width 32 to probe, initial 1 of width 32; students side by side"):
        _check_alike(config, one, folder, {"initial": narrow})
