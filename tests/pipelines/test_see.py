"""What a layer sees, by the command and in the report; the teachers are the demo world's, the student is untrained."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from featurize import teachers
from featurize.corpus.pack import pack_llava_json
from featurize.drawing import Components, Scale
from featurize.stage import run_pipeline
from olavlm import cli, runs
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.errors import OlaError
from olavlm.model import OlaVlmOutput
from pipelines.__main__ import main
from pipelines.report import report
from pipelines.see import load_student, look, open_sources, see
from train import student as students

IMAGES = 6
PIPELINE = """
name: seen
student: {layers: {depth: [2, 3], seg: [3], gen: [4]}}
stages: {pretrain: {losses: {depth: 1, seg: 1}}}
"""
COMPONENTS = "features: {} first three principal components as red, green, blue"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_pipeline: Callable[[Path, str], str]) -> PipelineConfig:
    """A run after pretraining: corpus, targets, and a student in ``run/pretrain/model``."""
    folder = tmp_path_factory.mktemp("seen")
    (folder / "images").mkdir()
    samples = []
    for i in range(IMAGES):
        _draw(i).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A box."}]
        samples.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    (folder / "samples.json").write_text(json.dumps(samples))
    pack_llava_json(folder / "samples.json", [folder / "images"], folder / "corpus")
    made = load_pipeline(write_pipeline(folder, PIPELINE))
    run_pipeline(made)
    stage = runs.stage_dir(made, "pretrain")
    runs.begin(stage, runs.depends_on(made, "pretrain"))
    for part in students.create(made):
        part.save_pretrained(stage / "model")
    runs.finish(stage, {})
    return made


@pytest.fixture(scope="module")
def model(config: PipelineConfig) -> Path:
    return Path(config.run_dir) / "pretrain" / "model"


@pytest.fixture(scope="module")
def student(model: Path) -> Any:
    return load_student(model)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    _draw(3).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``python -m pipelines see …``: exit code, stdout, stderr."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipelines", "see", *map(str, arguments)])
        capsys.readouterr()
        code = cli.run(main)
        return code, *capsys.readouterr()

    return run


def _draw(i: int) -> Image.Image:
    """A box of its own colour and place on a plain floor, 64 × 64."""
    image = Image.new("RGB", (64, 64), (120, 120, 130))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 34, 64, 64), fill=(90, 80, 70))
    draw.rectangle((4 + 7 * i, 20, 24 + 7 * i, 50), fill=((40 * i) % 256, (200 - 30 * i) % 256, (90 * i) % 256))
    return image


def test_the_command_writes_a_page_and_says_where(command: Command, model: Path, file: Path, read_page: Any) -> None:
    code, out, err = command(model, file)
    path = model.parent / "see" / "scene.html"
    assert (code, out) == (0, f"{path}\n")
    assert {line.split(":")[0] for line in err.splitlines()} == {"gen", "depth", "seg"}
    text = path.read_text()
    page = read_page(text)
    assert all(link.startswith("data:image/") or link == "data:," for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)
    shown = {image["alt"] for image in page.images}
    components = COMPONENTS.format("the target's")
    for column, task in [("layer 2", "depth"), ("layer 3", "depth"), ("layer 3", "seg"), *_each("teacher's target")]:
        assert {f"{task}, decoded map, {column}", f"{task}, {components}, {column}"} <= shown
    assert {f"gen, nearest, {column}" for column in ("teacher's target", "layer 4")} <= shown
    assert f"among {IMAGES} of " in page.text
    assert re.search(r"far [\d.]+ m\s*near [\d.]+ m", page.text)  # the demo's depth teacher is metric
    assert {"floor", "wall"} & set(page.text.split())  # the legend, in the words of the teacher's checkpoint
    before = path.read_bytes()
    assert command(model, file)[0] == 0
    assert path.read_bytes() == before


def _each(column: str) -> list[tuple[str, str]]:
    return [(column, "depth"), (column, "seg")]


@pytest.fixture
def predict(config: PipelineConfig, student: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the student predict, on every layer, the targets of these images; returns them by task."""

    def predict(*images: Image.Image) -> dict[str, torch.Tensor]:
        targets = {}
        for task, stated in config.teachers.items():
            teacher = teachers.load(stated)
            targets[task] = teacher.encode(torch.stack([teacher.preprocess(image) for image in images]))
        tasks = student[0].config.task_configs
        predictions = {task.name: dict.fromkeys(task.layers, targets[task.name]) for task in tasks}
        monkeypatch.setattr(type(student[0]), "forward", lambda *_, **__: OlaVlmOutput(predictions=predictions))
        return targets

    return predict


def test_who_predicts_the_target_sees_what_the_teacher_sees(config: PipelineConfig, student: Any, predict: Any) -> None:
    """A perfect prediction is drawn pixel by pixel as the target is, and finds the image itself."""
    images = [_draw(1), _draw(4)]
    predict(*images)
    sources = open_sources(student[0], config.teachers, config.data)
    for i, views in zip((1, 4), look(student, images, sources), strict=True):
        for view in views:
            assert all(column.cosine == pytest.approx(1, abs=1e-5) for column in view.columns[1:])
            for row in view.rows:
                first, *others = (tile.picture for tile in row.tiles)
                assert all(np.array_equal(first, other) for other in others)
        gen, depth, seg = views
        assert gen.rows[0].tiles[1].note == f"cosine 1.000, s{i}"
        assert {tile.note for tile in depth.rows[0].tiles[1:]} == {"off by 0% of the range"}
        assert {tile.note for tile in seg.rows[0].tiles[1:]} == {"mIoU 1.000 to the target's"}


def test_predictions_are_drawn_on_the_scale_of_the_target(config: PipelineConfig, student: Any, predict: Any) -> None:
    """Who predicts another image's target shows that image, in the colours of this one's target."""
    image, other = _draw(1), _draw(4)
    targets = {task: values[0] for task, values in predict(other).items()}
    (views,) = look(student, [image], open_sources(student[0], config.teachers, config.data))
    gen, depth, seg = views
    assert gen.rows[0].tiles[1].note == "cosine 1.000, s4"
    assert gen.rows[0].tiles[0].note == "cosine 1.000, s1"
    teacher = teachers.load(config.teachers["depth"])
    own = teacher.encode(teacher.preprocess(image)[None])
    mine, theirs = teacher.decode(torch.stack([own[0], targets["depth"]]))
    scale = Scale.of(mine, larger_is_darker=True)
    assert np.array_equal(depth.rows[0].tiles[1].picture, scale.draw(theirs))
    assert depth.rows[0].tiles[1].note == f"off by {scale.distance(mine, theirs):.0%} of the range"
    assert depth.bar["dark"] == f"far {mine.quantile(0.98):.3g} m"
    assert np.array_equal(depth.rows[1].tiles[2].picture, Components.of(own).draw(targets["depth"], 8))
    teacher = teachers.load(config.teachers["seg"])
    own = teacher.encode(teacher.preprocess(image)[None])
    mine, theirs = teacher.decode(torch.stack([own[0], targets["seg"]])).numpy()
    overlaps = [
        ((mine == a) & (theirs == a)).sum() / ((mine == a) | (theirs == a)).sum() for a in np.union1d(mine, theirs)
    ]
    assert len(overlaps) > 1
    assert seg.rows[0].tiles[1].note == f"mIoU {np.mean(overlaps):.3f} to the target's"
    assert all(column.cosine < 0.999 for view in views for column in view.columns[1:])


def test_layers_are_predicted_from_their_own_hidden_states(config: PipelineConfig, student: Any) -> None:
    """In the layout of the model's own forward pass, one image or several, without any answer."""
    model, processor = student
    sources = open_sources(model, config.teachers, config.data)
    together = look(student, [_draw(0), _draw(5)], sources)
    (alone,) = look(student, [_draw(5)], sources)
    text = processor.prompt([{"from": "human", "value": "<image>\nDescribe the image."}])
    with torch.no_grad():
        expected = model(**processor(images=[_draw(5)], text=text), predict=True).predictions
    for views in (together[1], alone):
        for view in views:
            for column in view.columns[1:]:
                wanted = expected[view.task][int(column.name.removeprefix("layer "))][0]
                torch.testing.assert_close(column.features, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (300, 7), 40),
        Image.new("RGBA", (33, 90), (200, 10, 10, 99)),
        Image.new("CMYK", (64, 64)),
        Image.new("P", (1, 1)),
        Image.new("I;16", (20, 30), 40_000),
    ],
    ids=lambda image: f"{image.mode} {image.size}",
)
def test_images_of_any_size_and_mode(model: Path, tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "odd.tiff")
    page = see(model, tmp_path / "odd.tiff", out=tmp_path / "odd.html").read_text()
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", page))


def test_without_weights_there_are_features_only_and_it_is_said(
    config: PipelineConfig, model: Path, file: Path, tmp_path: Path, read_page: Any
) -> None:
    """Of the run the depth teacher's folder is gone, of the segmentation teacher's the weights; gen is at hand."""
    stage = Path(shutil.copytree(model.parent, tmp_path / "run" / "pretrain"))
    written = OmegaConf.load(stage / "config.yaml")
    bare = tmp_path / "seg"
    shutil.copytree(config.teachers["seg"].weights, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    written.teachers.depth.weights = "nowhere/depth"
    written.teachers.seg.weights = str(bare)
    OmegaConf.save(written, stage / "config.yaml")
    page = read_page(see(stage / "model", file).read_text())
    assert "No target and no map: weights of teacher depth_anything: neither a folder" in page.text
    assert re.search(r"No target and no map: .*model\.safetensors", page.text)
    shown = [str(image["alt"]) for image in page.images]
    own = COMPONENTS.format("the predictions'")
    assert {f"depth, {own}, layer 2", f"depth, {own}, layer 3", f"seg, {own}, layer 3"} <= set(shown)
    assert not any("decoded map" in alt for alt in shown)
    assert "gen, nearest, teacher's target" in shown


def test_a_student_outside_a_run_takes_a_pipeline(
    config: PipelineConfig, model: Path, file: Path, tmp_path: Path, read_page: Any
) -> None:
    away = Path(shutil.copytree(model, tmp_path / "away" / "model"))
    page = read_page(see(away, file).read_text())
    assert page.text.count("No teacher is known: the student lies in no run") == 3
    own = COMPONENTS.format("the predictions'")
    assert f"depth, {own}, layer 2" in {image["alt"] for image in page.images}
    pipeline = str(Path(config.run_dir).parent / "pipeline.yaml")
    page = read_page(see(away, file, pipeline, out=tmp_path / "page.html").read_text())
    assert "No teacher" not in page.text
    assert any(image["alt"] == "depth, decoded map, layer 2" for image in page.images)


def test_other_images_can_be_searched(config: PipelineConfig, model: Path, file: Path, tmp_path: Path) -> None:
    """What is asked for and not there is an error; what the run implies and is not there is told in the page."""
    other = shutil.copytree(Path(config.run_dir).parent / "corpus", tmp_path / "corpus")
    targets = shutil.copytree(str(config.data["train"].targets), tmp_path / "targets")
    page = see(model, file, corpus=(str(other), str(targets)), out=tmp_path / "page.html").read_text()
    assert f"among {IMAGES} of {other}" in page
    with pytest.raises(OlaError, match=r"no corpus in \S+nowhere: corpus\.json is missing"):
        see(model, file, corpus=(str(tmp_path / "nowhere"), str(targets)))
    with pytest.raises(OlaError, match="no target store here"):
        see(model, file, corpus=(str(other), str(tmp_path)))
    for found in targets.glob("gen-*/commits/*"):
        found.unlink()
    with pytest.raises(OlaError, match=r"no image has all targets \(gen\) yet"):
        see(model, file, corpus=(str(other), str(targets)))
    shutil.rmtree(next(targets.glob("gen-*")))
    with pytest.raises(OlaError, match="no 'gen' targets here; there are: depth, seg"):
        see(model, file, corpus=(str(other), str(targets)))
    stage = Path(shutil.copytree(model.parent, tmp_path / "run" / "pretrain"))
    written = OmegaConf.load(stage / "config.yaml")
    written.data.train.targets = str(targets)
    OmegaConf.save(written, stage / "config.yaml")
    page = see(stage / "model", file).read_text()
    assert "No nearest images: " in page
    assert "there are: depth, seg" in page


def test_a_student_without_predictors_names_one_that_has_them(student: Any, model: Path, file: Path) -> None:
    bare = model.parent.parent / "finetune" / "model"
    shutil.copytree(model, bare)
    settings = json.loads((bare / "config.json").read_text())
    settings["tasks"] = [task | {"layers": []} for task in settings["tasks"]]
    (bare / "config.json").write_text(json.dumps(settings))
    state = load_file(bare / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("predictors.")}
    save_file(kept, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(OlaError, match=rf"no predictors in this student.*; {re.escape(str(model))} has some"):
        see(bare, file)


def test_bad_input_is_one_clear_line(
    command: Command, config: PipelineConfig, model: Path, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image")
    for arguments, said in {
        (tmp_path / "nothing", file): "no model here, config.json is missing",
        (model, tmp_path / "none.png"): "No such file or directory; expected an image",
        (model, tmp_path / "text.png"): "not an image in a known format",
        (model, file, "--pipeline", "nothing"): "pipeline 'nothing': no file",
        (
            model,
            file,
            "--pipeline",
            "llava558k-llama3-8b",
        ): "the student predicts 1 tokens of width 96, teachers.gen gives",
        (model, file, "--out", file / "page.html"): "cannot be written",
    }.items():
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), said
        assert said in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("error: ")
    stage = Path(shutil.copytree(model.parent, tmp_path / "run"))
    (stage / "config.yaml").write_text("{a: b}")
    with pytest.raises(OlaError, match=r"config\.yaml: not the configuration of a training stage .* give --pipeline"):
        see(stage / "model", file)


def test_the_report_shows_the_same_views(config: PipelineConfig, read_page: Any) -> None:
    page = read_page(report(config).read_text())
    shown = [image["alt"] for image in page.images]
    assert shown.count("depth, decoded map, layer 2") == 2
    assert shown.count("gen, nearest, layer 4") == 2
    assert "after pretrain, images of train." in " ".join(page.text.split())
    assert "Nothing to see" not in page.text


def test_the_report_shows_no_layers_of_a_student_that_was_trained_otherwise(
    config: PipelineConfig, read_page: Any
) -> None:
    changed = config.model_copy(update={"seed": 1})
    assert (
        "pretrain/config.yaml was made with another configuration (seed: 0 there, 1 now)"
        in read_page(report(changed).read_text()).text
    )


def test_the_report_shows_the_images_that_are_asked_for(config: PipelineConfig, read_page: Any) -> None:
    page = read_page(report(config, ["s4"]).read_text())
    assert [image["alt"] for image in page.images].count("depth, decoded map, layer 2") == 1
    with pytest.raises(OlaError, match=r"--images s44: no such key in 6 images of data\.train; s4 is one"):
        report(config, ["s44"])
