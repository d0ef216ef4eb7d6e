"""One YAML per pipeline, merged with ``key.path=value`` overrides, validated once, shared by every stage.

Unknown keys are refused with the nearest known name; every message names the file and the key.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from olavlm.errors import OlaError

View = Literal["squash", "pad", "center_crop"]
Format = Literal["zarr", "webdataset"]
Codec = Literal["fp16", "int8", "int4"]
#: Values of a token that share a scale in codec int4.
INT4_GROUP = 32
Dtype = Literal["float32", "bfloat16", "float16"]
Part = Literal["projector", "task_tokens", "predictors", "logit_scales", "language_model", "vision_tower"]

#: Where a bare pipeline name is looked up: ``pipelines/<name>.yaml`` beside this package.
PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LlavaJsonSource(Section):
    """LLaVA JSON (a list of ``{id, image, conversations}``) plus the folders its ``image`` paths are relative to."""

    kind: Literal["llava_json"]
    json_file: str
    image_roots: list[str]
    samples_per_tar: Positive = 1000


class CaptionFolderSource(Section):
    """A folder of images with a ``.txt`` caption of the same stem beside each."""

    kind: Literal["caption_folder"]
    folder: str
    samples_per_tar: Positive = 1000


class WebDatasetSource(Section):
    """Existing WebDataset tars, adopted in place: only the index is written."""

    kind: Literal["webdataset"]
    tars: str  # a glob


class DemoWorldSource(Section):
    """Rendered scenes of the demo world; `split` names a range of scene seeds disjoint from every other split's."""

    kind: Literal["demo_world"]
    split: Literal["pretrain", "finetune", "probe"]
    scenes: Positive
    level: Literal["easy", "hard"] = "easy"
    samples_per_tar: Positive = 250


class BenchmarkSource(Section):
    """The images of a benchmark in CV-Bench's Parquet layout, each once: for students that are fed features of them."""

    kind: Literal["benchmark"]
    folder: str
    samples_per_tar: Positive = 1000


class PhotosSource(Section):
    """Photographs that installable packages carry (scikit-image, scikit-learn), with captions written for them."""

    kind: Literal["photos"]
    samples_per_tar: Positive = 8


Source = Annotated[
    LlavaJsonSource | CaptionFolderSource | WebDatasetSource | DemoWorldSource | PhotosSource | BenchmarkSource,
    Field(discriminator="kind"),
]


class DataConfig(Section):
    """A corpus, the target store that belongs to it, and how the corpus comes to be."""

    corpus: str
    targets: str | None = None  # absent: never featurized (fine-tuning data, for example)
    source: Source | None = None  # absent: the corpus already exists
    expected_images: Positive | None = None  # lets `plan` count before the corpus is there


class TeacherConfig(Section):
    """A teacher by registered name and weights; with the weights' hash these fields are the target's identity."""

    teacher: str  # depth_anything, oneformer, unclip, vision_model; or package.module:Class, see featurize.teachers
    weights: str  # hub id or folder
    revision: str | None = None
    view: View = "squash"
    input_size: Positive
    grid: Positive  # targets of dense teachers are grid × grid tokens; 1 for pooled ones
    width: Positive
    layers: list[int] | None = None  # backbone blocks whose mean is the target, where the teacher has such a choice
    codec: Codec = "int8"
    dtype: Dtype = "float32"
    batch_size: Positive = 16
    gflop_per_image: float | None = None  # for `plan`; a forward of one image

    @property
    def tokens(self) -> int:
        """Target tokens per image."""
        return self.grid * self.grid


class StudentConfig(Section):
    """What the student is built from, where in its language model each task is predicted, and what it is fed."""

    vision_tower: str
    language_model: str  # hub id or folder, or a GGUF file in one: folder/model.gguf
    vision_feature_layer: int = -2
    tasks: list[str] = ["gen", "depth", "seg"]  # order of the task tokens in the sequence
    task_tokens: Annotated[int, Field(ge=0)] = 8  # per task
    layers: dict[str, list[Positive]]  # 1-based; num_hidden_layers means after the final norm; of tasks only
    encoders: list[str] = []  # teachers whose stored features the student is fed behind every image, in this order
    dims: dict[str, Positive] = {}  # inner width of a task's predictors; default: the published rule
    predictors_read_text: bool = True
    image_tokens: Positive | None = None  # stated where `plan` must work without weights
    parameters: float | None = None  # billions, for `plan` without weights


class LoraConfig(Section):
    """Low-rank adaptation of the language model (arXiv 2106.09685); the defaults are LLaVA-1.5's."""

    rank: Positive = 128
    alpha: Positive = 256  # the update is scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    layers: list[str] | None = None  # names of linear layers, e.g. q_proj; default: every one in the decoder's blocks


class StageConfig(Section):
    """One training stage (pretrain, vpt, finetune)."""

    data: list[str]
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}  # sampling weight by data name; default: by size
    init: str | None = None  # stage (or model folder) whose model this stage starts from; absent: built afresh
    view: View = "squash"
    allow_view_mismatch: bool = False
    max_missing: Fraction = 0.01  # share of images that may lack a target before the job refuses to start
    trainable: list[Part]
    lora: LoraConfig | None = None  # trains adapters in place of the language model's own weights; exported merged
    losses: dict[str, Annotated[float, Field(ge=0)]] = {}  # embedding-loss weight by task; empty: next-token only
    contrastive: Annotated[float, Field(ge=0)] = 0.3
    lr: Annotated[float, Field(gt=0)]
    lrs: dict[Part, Annotated[float, Field(gt=0)]] = {}  # where a part deviates from lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Fraction = 0.03
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    global_batch: Positive
    micro_batch: Positive
    group_by_length: bool = False
    shuffle_window: Positive | None = None  # samples; default: shuffled over the whole epoch (see train/order.py)
    clip: Annotated[float, Field(gt=0)] = 1.0
    max_length: Positive = 4096
    dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    fully_shard: bool = False  # the language model in slices over the ranks, where one device cannot hold it
    loader_threads: Positive = 2
    log_every: Positive = 10
    checkpoint_every: Positive = 200
    keep: Positive = 2


class ProbeConfig(Section):
    """Per-layer probes: one plain predictor per layer and task on a frozen student, targets from the store."""

    data: str
    students: list[str]  # `initial` (as built), stages, or model folders of other runs; compared with the first
    tasks: list[str]
    layers: list[Positive] | None = None  # default: all
    view: View = "squash"
    allow_view_mismatch: bool = False
    max_missing: Fraction = 0.01
    steps: Positive = 200
    batch: Positive = 32
    lr: Annotated[float, Field(gt=0)] = 1e-3
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    max_length: Positive = 512  # tokens of a sample beside its first image; images behind them are not probed


class UnclipConfig(Section):
    """Images generated from predicted image embeddings, by diffusers' stable unCLIP."""

    pipeline: str  # folder or hub id with the layout of stabilityai/stable-diffusion-2-1-unclip
    images: str  # folder of the images whose embeddings are predicted
    limit: Positive | None = None  # of these images, the first in the order of their paths
    steps: Positive = 20  # of denoising
    inception: str | None = None  # TorchScript file (NVIDIA's inception-2015-12-05.pt): adds FID


class ProbeTasksConfig(Section):
    """What the teachers' own decoders make of the features that probes predict; layouts: olavlm/eval/truth.py."""

    pairs: str | None = None  # folder with DA-2K's annotations.json: is the nearer point the nearer one?
    labels: str | None = None  # folder with images/ and labels/: mIoU
    ignore: Annotated[int, Field(ge=0)] = 255  # label of pixels that do not count
    depths: str | None = None  # folder with images/ and depths/: relative error of metric depth
    unclip: UnclipConfig | None = None
    scenes: Positive | None = None  # demo world: rendered, with all that is known of them, into folders not there yet
    level: Literal["easy", "hard"] = "easy"  # of those scenes
    batch: Positive = 16

    @property
    def folders(self) -> dict[str, str]:
        """The folders of truths, by their key here."""
        given = {"pairs": self.pairs, "labels": self.labels, "depths": self.depths}
        return {key: folder for key, folder in given.items() if folder}

    @model_validator(mode="after")
    def _tasks(self) -> "ProbeTasksConfig":
        if not self.folders and not self.unclip:
            raise ValueError("probe_tasks: nothing to measure; expected pairs, labels, depths (folders) or unclip")
        if self.scenes and not self.folders:
            raise ValueError("probe_tasks.scenes: rendered into the folders of pairs, labels or depths: none is given")
        return self


class EvalConfig(Section):
    """Benchmarks from their published Parquet layouts; those whose folder is given are run."""

    cv_bench: str | None = None  # folder with test_2d.parquet and test_3d.parquet
    mmstar: str | None = None  # folder with mmstar.parquet
    scenes: Positive | None = None  # demo world: rendered into cv_bench's folder if it is not there
    level: Literal["easy", "hard"] = "easy"  # of those scenes
    data: str | None = None  # with the benchmark's images and their targets, for students with encoders
    student: str = "finetune"
    batch: Positive = 16
    max_new_tokens: Positive = 128
    limit: Positive | None = None  # questions of each benchmark

    @property
    def folders(self) -> dict[str, str]:
        """The benchmarks to run, by their key here, and where they are."""
        given = {"cv_bench": self.cv_bench, "mmstar": self.mmstar}
        return {key: folder for key, folder in given.items() if folder}

    @model_validator(mode="after")
    def _benchmarks(self) -> "EvalConfig":
        if not self.folders:
            raise ValueError("eval: no benchmark; expected cv_bench or mmstar: a folder")
        if self.scenes and not self.cv_bench:
            raise ValueError("eval.scenes: they are rendered into the folder of eval.cv_bench, which is not given")
        return self


class FeaturizeConfig(Section):
    """How the featurization job runs; nothing here changes a target's values."""

    executor: Literal["ray", "inprocess"] = "ray"
    workers: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    decode_threads: Positive = 2
    block: Annotated[int, Field(gt=0, le=256)] = 256  # images per Zarr shard or WebDataset tar
    format: Format = "zarr"  # webdataset: tars of {key}.npy; a set keeps the form it was begun in
    teacher_tflops: float | None = None  # sustained, per device, for `plan`
    training_runs: Positive = 3  # experiments the store will serve, for `plan`'s break-even


class CacheConfig(Section):
    """Where training keeps what it reads of tars and targets in an object store; changes nothing but its speed."""

    folder: str  # on a local disk; all processes of a machine, and all pipelines, may share it
    gib: Annotated[float, Field(gt=0)]  # that its files may take; a full one goes on serving what it has


class PipelineConfig(Section):
    """A whole pipeline file."""

    name: str
    run_dir: str = "runs/${name}"
    seed: int = 0
    data: dict[str, DataConfig]
    teachers: dict[str, TeacherConfig] = {}
    featurize: FeaturizeConfig = FeaturizeConfig()
    student: StudentConfig
    stages: dict[Literal["pretrain", "vpt", "finetune"], StageConfig]
    probe: ProbeConfig | None = None
    probe_tasks: ProbeTasksConfig | None = None
    eval: EvalConfig | None = None
    cache: CacheConfig | None = None

    @model_validator(mode="after")
    def _references(self) -> "PipelineConfig":
        def known(key: str, value: str, names: Any) -> None:
            if value not in names:
                raise ValueError(f"{key}: {value!r} is not defined here; known: {', '.join(sorted(names)) or 'none'}")

        for task, teacher in self.teachers.items():
            if teacher.codec == "int4" and teacher.width % INT4_GROUP:
                raise ValueError(
                    f"teachers.{task}.codec: int4 scales groups of {INT4_GROUP} values, width is {teacher.width}"
                )
        for task in self.student.tasks:
            known("student.tasks", task, self.teachers)
        if "://" in self.run_dir:
            raise ValueError(f"run_dir: expected a local folder, found {self.run_dir!r}")
        if self.cache and "://" in self.cache.folder:
            raise ValueError(f"cache.folder: expected a local folder, found {self.cache.folder!r}")
        for task in self.student.layers:
            known("student.layers", task, self.teachers)
        for encoder in self.student.encoders:
            known("student.encoders", encoder, self.teachers)
        if len(set(self.student.encoders)) != len(self.student.encoders):
            raise ValueError(f"student.encoders: {', '.join(self.student.encoders)} names a teacher twice")
        predicted = [task for task in self.student.tasks if task in self.student.layers]
        for name, stage in self.stages.items():
            for data in stage.data:
                known(f"stages.{name}.data", data, self.data)
            for data in stage.weights:
                known(f"stages.{name}.weights", data, stage.data)
            for task in stage.losses:
                known(f"stages.{name}.losses", task, predicted)
            if stage.lora and "language_model" not in stage.trainable:
                raise ValueError(f"stages.{name}.lora: needs language_model among stages.{name}.trainable")
            if stage.lora and stage.fully_shard:
                raise ValueError(f"stages.{name}.fully_shard: not together with lora, whose frozen weights are merged")
            if stage.global_batch % stage.micro_batch:
                raise ValueError(
                    f"stages.{name}.micro_batch: {stage.micro_batch} does not divide global_batch {stage.global_batch}"
                )
            if stage.losses:
                for data in stage.data:
                    if self.data[data].targets is None:
                        raise ValueError(f"data.{data}.targets: stage {name} has embedding losses and needs a store")
            self._check_fed(f"stages.{name}.data", stage.data)
        if self.probe:
            known("probe.data", self.probe.data, self.data)
            for task in self.probe.tasks:
                known("probe.tasks", task, self.teachers)
            self._check_fed("probe.data", [self.probe.data])
        if self.probe_tasks and not self.probe:
            raise ValueError("probe_tasks: needs a probe section, whose probes predict the features")
        if self.eval:
            known("eval.student", self.eval.student, self.stages)
            if self.eval.data is not None:
                known("eval.data", self.eval.data, self.data)
            self._check_fed("eval.data", [self.eval.data])
        return self

    def _check_fed(self, key: str, names: Sequence[str | None]) -> None:
        """Raise if a student that is fed features would be given images of data without a store."""
        encoders = ", ".join(self.student.encoders)
        for name in names if encoders else ():
            if name is None:
                raise ValueError(f"{key}: missing; the student is fed features ({encoders}) of these images, too")
            if self.data[name].targets is None:
                raise ValueError(
                    f"data.{name}.targets: {key} is fed to student.encoders ({encoders}) and needs a store"
                )


def load_pipeline(pipeline: str, overrides: list[str] | None = None) -> PipelineConfig:
    """Read, merge and validate a pipeline.

    Args:
        pipeline: a name (``demo`` → ``pipelines/demo.yaml``) or the path of a YAML file.
        overrides: ``key.path=value`` strings, values in YAML (``student.layers.depth=[3]``).

    Raises:
        OlaError: no such file, broken YAML, unknown key, wrong type or range, naming the file and the key.
    """
    path = Path(pipeline)
    if path.suffix not in {".yaml", ".yml"}:
        path = PIPELINES / f"{pipeline}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in PIPELINES.glob("*.yaml"))
        raise OlaError(f"pipeline {pipeline!r}: no file {path}; known pipelines: {', '.join(names)}")
    try:
        merged: Any = OmegaConf.load(path)
        if not OmegaConf.is_dict(merged):
            raise OlaError(f"{path}: expected a mapping with the keys {', '.join(PipelineConfig.model_fields)}")
        for override in overrides or []:
            if "=" not in override:
                raise OlaError(f"override {override!r}: expected key.path=value")
            key = override.partition("=")[0]
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(merged, key, value, merge=False, force_add=True)  # {} empties a mapping
        raw = OmegaConf.to_container(OmegaConf.merge({"run_dir": "runs/${name}"}, merged), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise OlaError(f"{path}: {str(error).strip().splitlines()[0]}") from None
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        raise OlaError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML, for a run's folder."""
    return str(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _explain(error: Any) -> str:
    """One pydantic error as ``key: what is wrong``, with the nearest known key where the key is unknown."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        siblings = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), siblings, n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(siblings))}"
        return f"{key}: unknown key{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return str(message)
    if error["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {message}, found {error['input']!r}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Field names allowed at a location of the pipeline file."""
    models: list[Any] = [PipelineConfig]
    for part in location:
        found: list[Any] = []
        for model in models:
            if part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
            else:
                found.append(model)  # a dict key (a data name, a task) or a union tag: same section
        models = found
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    """The section classes mentioned anywhere in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_in(arg)]
