"""Probe tasks: the demo world's teachers decode what the probes of an untrained student predict of rendered scenes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from featurize import teachers
from featurize.corpus.pack import pack_llava_json
from featurize.stage import run_pipeline
from olavlm import runs
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.frechet import frechet_distance
from pipelines.demo_world import probes as linear
from pipelines.demo_world.train_segmentation import tokenizer
from pipelines.demo_world.truth import PAIRS, write_truth
from pipelines.probe_tasks.generation import Unclip
from pipelines.probe_tasks.stage import probe_tasks
from train.probe import probe

SCENES, WIDTH, GENERATED = 12, 96, 3
PIPELINE = """
name: probed
student: {{layers: {{}}}}
probe: {{data: train, students: [initial], tasks: [depth, seg, gen], layers: [2, 4], steps: 2, batch: 6}}
probe_tasks:
  pairs: {0}/truth
  labels: {0}/truth
  depths: {0}/truth
  unclip:
    {{pipeline: {0}/unclip, images: {0}/truth/images, limit: 3, steps: 2, inception: {0}/inception.pt}}
  batch: 5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_pipeline: Callable[[Path, str], str]) -> Path:
    """Truths, a corpus of the same images, its targets, weights to generate with; trained probes."""
    folder = tmp_path_factory.mktemp("probed")
    write_truth(folder / "truth", SCENES, seed=0, level="easy", workers=1)
    samples = [
        {
            "id": image.stem,
            "image": image.name,
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}],
        }
        for image in sorted((folder / "truth" / "images").iterdir())
    ]
    (folder / "samples.json").write_text(json.dumps(samples))
    pack_llava_json(folder / "samples.json", [folder / "truth" / "images"], folder / "corpus")
    _save_unclip(folder / "unclip")
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        torch.jit.script(_Colours()).save(str(folder / "inception.pt"))
    config = load_pipeline(write_pipeline(folder, PIPELINE.format(folder)))
    run_pipeline(config)
    probe(config)
    probe_tasks(config)
    return folder


@pytest.fixture
def load(folder: Path) -> Callable[..., PipelineConfig]:
    """The pipeline, with overrides."""
    return lambda *overrides: load_pipeline(str(folder / "pipeline.yaml"), list(overrides))


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "probe_tasks" / "probe_tasks.json").read_text())
    return found


class _Colours(torch.nn.Module):
    """Inception's interface: the mean colour of uint8 images of any size, (n, 3)."""

    def forward(self, img: torch.Tensor, use_fp16: bool = False, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        assert return_features
        return img.float().mean([2, 3])


def _save_unclip(folder: Path) -> None:
    """A tiny unCLIP of diffusers' real classes, random weights, in the layout of stable-diffusion-2-1-unclip."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=WIDTH
    )
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessorPil(),
        image_encoder=CLIPVisionModelWithProjection(vision),
        image_normalizer=StableUnCLIPImageNormalizer(WIDTH),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer(),
        text_encoder=CLIPTextModel(text),
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 32),
            layers_per_block=1,
            norm_num_groups=8,  # one per channel would take away what the embedding adds to it
            attention_head_dim=8,
            cross_attention_dim=32,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * WIDTH,
        ),
        scheduler=DDIMScheduler(clip_sample=False),
        vae=AutoencoderKL(
            block_out_channels=(32, 32),
            latent_channels=4,
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    )
    for parameter in pipeline.unet.class_embedding.parameters():  # so that random weights heed the embedding
        parameter.data *= 5
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]  # as published; with torchvision only
    (folder / "model_index.json").write_text(json.dumps(index))


def test_every_measure_has_every_layer_beside_target_and_floor(result: dict[str, Any]) -> None:
    measures = ["depth_order", "seg_miou", "depth_absrel", "gen_similarity", "gen_fid"]
    assert list(result["measures"]) == measures
    assert [result["measures"][name]["better"] for name in measures] == ["higher", "higher", "lower", "higher", "lower"]
    assert {name: list(of) for name, of in result["students"]["initial"].items()} == {
        name: ["2", "4"] for name in measures
    }
    assert {name: list(of) for name, of in result["reference"].items()} == {
        name: ["target", "floor"] for name in measures
    }
    for name, cells in [*result["students"]["initial"].items(), *result["reference"].items()]:
        for cell in cells.values():
            assert cell["n"] == (GENERATED if name.startswith("gen") else SCENES)
            assert ("low" in cell) == (name != "gen_fid")
            assert name == "gen_fid" or cell["low"] <= cell["value"] <= cell["high"]


def test_what_the_teachers_see_is_right_and_the_mean_feature_knows_no_order(result: dict[str, Any]) -> None:
    """Were a view, a sign or a label the wrong way round, the teachers' own features would be at or below chance."""
    found = {name: {column: cell["value"] for column, cell in of.items()} for name, of in result["reference"].items()}
    assert found["depth_order"]["target"] > 0.8
    assert found["depth_order"]["floor"] == pytest.approx(0.5, abs=0.2)
    assert found["seg_miou"]["target"] > 0.55 > found["seg_miou"]["floor"]
    assert found["depth_absrel"]["target"] < 0.7 * found["depth_absrel"]["floor"]
    assert found["gen_similarity"]["target"] <= 1


def test_the_targets_miou_is_that_of_its_decoded_maps(
    load: Callable[..., PipelineConfig], folder: Path, result: dict[str, Any]
) -> None:
    teacher = teachers.load(load().teachers["seg"])
    predicted, truth = [], []
    for image in sorted((folder / "truth" / "images").iterdir()):
        maps = teacher.decode(teacher.encode(teacher.preprocess(Image.open(image))[None]))
        predicted.append(np.kron(maps[0].numpy(), np.ones((2, 2), np.int64)))  # 32 × 32 over an image of 64 × 64
        truth.append(np.asarray(Image.open(folder / "truth" / "labels" / image.name)).astype(np.int64))
    expected = np.nanmean(linear.miou(np.stack(truth), np.stack(predicted), 7))
    assert result["reference"]["seg_miou"]["target"]["value"] == pytest.approx(expected)


def test_pairs_lie_where_position_says_nothing(folder: Path) -> None:
    annotations = json.loads((folder / "truth" / "annotations.json").read_text())
    higher = 0
    for name, pairs in annotations.items():
        depth = np.asarray(Image.open(folder / "truth" / "depths" / Path(name).name)).astype(float)
        for pair in pairs:
            closer, other = (pair[key] for key in sorted(("point1", "point2"), key=pair["closer_point"].__ne__))
            assert depth[tuple(other)] > 1.09 * depth[tuple(closer)]
            higher += closer[0] < other[0]
        assert len(pairs) <= PAIRS
    assert 2 * higher == sum(map(len, annotations.values()))


def test_images_are_kept_and_made_again_as_they_were(
    load: Callable[..., PipelineConfig], folder: Path, result: dict[str, Any]
) -> None:
    stage = folder / "run" / "probe_tasks"
    images = stage / "images"
    names = [f"00000{i}.png.png" for i in range(GENERATED)]
    assert {str(path.relative_to(images)) for path in images.rglob("*.png")} == {
        f"{who}/gen-{column}/{name}"
        for who, columns in {"teacher": ("target", "floor"), "initial": ("2", "4")}.items()
        for column in columns
        for name in names
    }
    first = images / "initial" / "gen-2" / names[1]
    before = first.read_bytes()
    first.unlink()
    (stage / "done.json").unlink()
    marked = {**result, "students": {}}
    replace(stage / "probe_tasks.json", json.dumps(marked).encode())
    probe_tasks(load())
    assert first.read_bytes() == before
    assert json.loads((stage / "probe_tasks.json").read_text()) == result
    pictures = [np.stack([np.asarray(Image.open(images / f"teacher/gen-{c}" / n)) for n in names]) for c in
                ("target", "floor")]  # fmt: skip
    assert not np.array_equal(*pictures)
    real = np.stack([np.asarray(Image.open(folder / "truth" / "images" / n[:-4])) for n in names])
    colours = [of.astype(float).mean((1, 2)) for of in (pictures[0], real)]
    assert result["reference"]["gen_fid"]["target"]["value"] == pytest.approx(frechet_distance(*colours), rel=1e-4)


def test_an_image_depends_on_its_embedding_and_its_number_alone(
    load: Callable[..., PipelineConfig], tmp_path: Path
) -> None:
    settings = load().probe_tasks
    assert settings
    assert settings.unclip
    unclip = Unclip(settings.unclip, WIDTH, torch.float32, torch.device("cpu"), seed=0)
    embeddings = torch.randn(GENERATED, WIDTH, generator=torch.Generator().manual_seed(1))
    embeddings[1] = embeddings[0]
    one = [np.asarray(Image.open(file)).astype(int) for file in unclip.generate(embeddings, tmp_path / "a", 3)]
    alone = [np.asarray(Image.open(file)).astype(int) for file in unclip.generate(embeddings, tmp_path / "b", 1)]
    assert max(np.abs(a - b).max() for a, b in zip(one, alone, strict=True)) <= 1  # a rounding step
    assert np.abs(one[0] - one[1]).max() > 1  # the same embedding, other noise
    embeddings[0] += 1
    changed = np.asarray(Image.open(unclip.generate(embeddings, tmp_path / "c", 3)[0])).astype(int)
    assert np.abs(changed - one[0]).max() > 1  # the same noise, another embedding


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["probe.tasks=[gen]"], r"probe_tasks\.pairs: no teacher of probe\.tasks \(gen\) gives depth"),
        (["probe.tasks=[depth]", "probe_tasks.labels=null"], r"probe_tasks\.unclip: no teacher .*\(depth\) is unclip"),
        (["probe_tasks.pairs={0}/corpus"], r"corpus/annotations\.json: .*No such file"),
        (["probe_tasks.unclip.pipeline={0}/corpus"], r"unclip\.pipeline: .*corpus: .*model_index"),
        (["probe_tasks.unclip.inception={0}/samples.json"], r"samples\.json: no TorchScript file"),
        (["probe_tasks.unclip.inception={0}/none.pt"], r"inception: no file .*none\.pt"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    load: Callable[..., PipelineConfig], folder: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = load(f"run_dir={tmp_path}", *(override.format(folder) for override in overrides))
    (tmp_path / "probe").mkdir()
    runs.begin(tmp_path / "probe", runs.depends_on(config, "probe"))
    shutil.copy(folder / "run" / "probe" / "mean.safetensors", tmp_path / "probe")
    runs.finish(tmp_path / "probe", {})
    with pytest.raises(OlaError, match=message) as error:
        probe_tasks(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "probe_tasks" / "probe_tasks.json").exists()


def test_probes_come_first(load: Callable[..., PipelineConfig], tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"probe has not finished; run it first \(make probe\)"):
        probe_tasks(load(f"run_dir={tmp_path}"))
    runs.begin(tmp_path / "probe", runs.depends_on(load(), "probe"))
    runs.finish(tmp_path / "probe", {})
    with pytest.raises(OlaError, match=r"probe/config\.yaml was .*\(probe\.steps: 2 there, 3 now"):
        probe_tasks(load(f"run_dir={tmp_path}", "probe.steps=3"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("probe=null", "probe_tasks: needs a probe section"),
        ("probe_tasks={batch: 3}", "probe_tasks: nothing to measure"),
        ("probe_tasks.pars=x", "pars: unknown key, did you mean 'pairs'"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(
    load: Callable[..., PipelineConfig], override: str, message: str
) -> None:
    with pytest.raises(OlaError, match=message):
        load(override)
