"""The pipeline file: what is accepted, and what a person reads when it is not."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from olavlm.config import PIPELINES, dump, load_pipeline
from olavlm.errors import OlaError


@pytest.mark.parametrize("name", sorted(path.stem for path in PIPELINES.glob("*.yaml")))
def test_every_shipped_pipeline_is_valid(name):
    config = load_pipeline(name)
    assert config.name == name
    assert config.run_dir == f"runs/{name}"


def test_overrides_are_typed_and_interpolated():
    config = load_pipeline("demo", ["student.layers.depth=[3]", "stages.pretrain.lr=2e-4", "run_dir=/elsewhere"])
    assert config.student.layers["depth"] == [3]
    assert config.stages["pretrain"].lr == pytest.approx(2e-4)
    assert config.data["pretrain"].corpus == "/elsewhere/corpus/pretrain"


def test_an_override_replaces_what_was_there():
    config = load_pipeline("demo", ["stages.pretrain.losses={}", "student.layers={depth: [1]}"])
    assert config.stages["pretrain"].losses == {}
    assert config.student.layers == {"depth": [1]}


INT4_WIDTH = "teachers.depth.codec: int4 scales groups of 32 values, width is 48"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.task_tokenz=4", "student.task_tokenz: unknown key, did you mean 'task_tokens'?"),
        ("teachers.depth.codek=int8", "teachers.depth.codek: unknown key, did you mean 'codec'?"),
        ("seed=abc", "seed: Input should be a valid integer"),
        ("stages.pretrain.lr=-1", "stages.pretrain.lr: Input should be greater than 0"),
        ("teachers.depth.codec=int3", "teachers.depth.codec: Input should be 'fp16', 'int8' or 'int4'"),
        ("teachers.depth={teacher: a, weights: b, input_size: 8, grid: 2, width: 48, codec: int4}", INT4_WIDTH),
        ("student.layers.sound=[1]", "student.layers: 'sound' is not defined here; known: depth, gen, seg"),
        ("stages.pretrain.data=[web]", "stages.pretrain.data: 'web' is not defined here"),
        ("stages.pretrain.micro_batch=5", "stages.pretrain.micro_batch: 5 does not divide global_batch"),
        ("data.pretrain.targets=null", "data.pretrain.targets: stage pretrain has embedding losses and needs a store"),
        ("eval.cv_bench=null", "eval: no benchmark; expected cv_bench or mmstar: a folder"),
        ("eval.student=vpt", "eval.student: 'vpt' is not defined here; known: finetune, pretrain"),
        ("eval={mmstar: a, scenes: 5}", "eval.scenes: they are rendered into the folder of eval.cv_bench"),
        ("no-equals-sign", "expected key.path=value"),
    ],
)
def test_bad_override_names_file_key_and_expectation(override, expected):
    with pytest.raises(OlaError) as error:
        load_pipeline("demo", [override])
    assert expected in str(error.value)


def test_missing_file_lists_what_is_known():
    with pytest.raises(OlaError, match=r"no file .*nowhere\.yaml; known pipelines: .*demo"):
        load_pipeline("nowhere")


def test_broken_yaml_names_the_file(tmp_path: Path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [unclosed")
    with pytest.raises(OlaError, match=r"broken\.yaml"):
        load_pipeline(str(broken))


def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path):
    listing = tmp_path / "list.yaml"
    listing.write_text("- a\n- b\n")
    with pytest.raises(OlaError, match=r"list\.yaml"):
        load_pipeline(str(listing))


def test_dump_round_trips(tmp_path: Path):
    config = load_pipeline("demo")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load_pipeline(str(copy)) == config
    assert OmegaConf.load(copy).name == "demo"
