"""What every teacher has in common: finding weights, hashing them, its identity, and images as normalised tensors."""

import json
from abc import ABC, abstractmethod
from contextlib import ExitStack
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from olavlm.config import TeacherConfig
from olavlm.data.images import apply_view
from olavlm.data.targets import Identity
from olavlm.errors import OlaError

#: What a configuration says beside how its network computes; and whatever begins with an underscore.
_NAMES = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "id2label", "label2id"}

#: Changes whenever `preprocess` of any teacher would give other numbers for the same image.
PREPROCESSING_VERSION = 1


class Teacher(ABC):
    """A frozen vision network, always in eval mode: an image becomes a target, a target something to look at.

    Attributes:
        model_class: the network's class in transformers; None where the folder says which.
        depth_sign: what a larger decoded depth means, for depth teachers.
        depth_unit: of decoded depths; None where they are relative.
        weights_folder: folder inside the repository that holds config.json and the weights.
        processor_folder: folder that holds preprocessor_config.json.
        files: what of the repository is needed, for the command that downloads it.
    """

    model_class: Any = None
    depth_sign: Literal["larger_is_closer", "larger_is_farther"] | None = None
    depth_unit: str | None = None
    weights_folder = "."
    processor_folder = "."
    files: tuple[str, ...] = ("*.json", "*.txt", "*.safetensors")

    def __init__(self, config: TeacherConfig, device: str = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.folder = find_weights(config, self.files)
        self.architecture = read_architecture(self.folder / self.weights_folder / "config.json")
        expected: Any = getattr(self.model_class, "config_class", object)
        if not isinstance(self.architecture, expected):
            raise self.refuse("model_type", self.architecture.model_type, expected.model_type)
        processor = self.folder / self.processor_folder / "preprocessor_config.json"
        self.processor = _read_json(processor)
        self.mean, self.std = _statistics(processor, self.processor)
        weight_files(self.folder / self.weights_folder)

    @cached_property
    def model(self) -> nn.Module:
        """The network, in eval mode, in the configured dtype, on the device."""
        disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar per worker and teacher would bury the job's own
        return self.load_model().to(self.device, self.dtype).eval().requires_grad_(False)

    def load_model(self) -> nn.Module:
        """The network with the weights in the folder."""
        return self.from_pretrained()

    def from_pretrained(self, unused: tuple[str, ...] = ()) -> nn.Module:
        """`model_class` with every tensor from the folder: what is missing there, transformers would make up.

        Args:
            unused: prefixes of tensors that targets do not depend on, and that a checkpoint may therefore lack.

        Raises:
            OlaError: another architecture, a torn file, a tensor missing or of another shape.
        """
        folder = self.folder / self.weights_folder
        what = f"{folder}: cannot be loaded as {self.model_class.__name__}"
        # No table of a dual model's other tower, which is left in the file on purpose.
        verbosity = get_verbosity()
        set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            model, info = self.model_class.from_pretrained(
                folder,
                config=self.architecture,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # named below instead
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise OlaError(f"{what}: {_first_line(error)}") from None
        finally:
            set_verbosity(verbosity)
        for name, found, expected in sorted(info["mismatched_keys"]):
            raise OlaError(f"{what}: {name} is {tuple(found)}, config.json makes it {tuple(expected)}")
        missing = sorted(name for name in info["missing_keys"] if not name.startswith(unused))
        if missing:
            raise OlaError(f"{what}: {len(missing)} tensors are missing, among them {missing[0]}")
        loaded: nn.Module = model
        return loaded

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Targets (n, tokens, width) float32 of images (n, 3, S, S) as `preprocess` makes them, on the device."""

    def decode(self, features: Tensor) -> Tensor | None:
        """Targets (n, tokens, width) as maps (n, H, W): depth float32 or labels int64; None: none to draw."""
        return None

    @property
    def labels(self) -> dict[int, str]:
        """What the labels of a decoded map are called, for teachers that decode to labels."""
        return {}

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The identity's ``position_embedding``, ``layers`` and ``pooling``, after checking the configuration."""

    @property
    def sizes(self) -> list[tuple[int, Image.Resampling]]:
        """The resizes an image goes through: the view's, then any of the teacher's own."""
        return [(self.config.input_size, Image.Resampling.BICUBIC)]

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image through the view and the resizes, rescaled to [0, 1] and normalised: (3, S, S) float32.

        Raises:
            ValueError: nothing can be made of this image; it has no target, and the message is the reason.
        """
        (size, resample), *further = self.sizes
        image = apply_view(image, self.config.view, size, resample)
        for size, resample in further:
            image = image.resize((size, size), resample)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
        return (pixels.float() / 255 - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def identity(self, task: str) -> Identity:
        """Everything the targets depend on; reads the whole of the weights once, to hash them."""
        config = self.config
        resizes = " then ".join(f"{size} by PIL {resample.name.lower()}" for size, resample in self.sizes)
        normalised = f"mean {self.mean} std {self.std}"
        pillow = PIL.__version__.partition(".")[0]
        return Identity(
            task=task,
            teacher=config.teacher,
            weights=Path(config.weights).name if Path(config.weights).is_dir() else config.weights,
            revision=config.revision,
            weights_hash=f"{weights_hash(self.folder / self.weights_folder)}-{architecture_hash(self.architecture)}",
            compute_dtype=config.dtype,
            view=config.view,
            input_size=config.input_size,
            preprocessing=f"v{PREPROCESSING_VERSION}: {resizes}, RGB / 255, {normalised}, Pillow {pillow}",
            grid=config.grid,
            width=config.width,
            codec=config.codec,
            **self.describe(),
        )

    def refuse(self, key: str, found: object, expected: object) -> OlaError:
        """The error for a configuration this network cannot fulfil."""
        return OlaError(
            f"teacher {self.config.teacher} ({self.folder}): {key} is {found}, the network gives {expected}"
        )


def find_weights(config: TeacherConfig, files: tuple[str, ...]) -> Path:
    """The folder of a teacher's weights: a path, or a hub id that has been downloaded.

    Raises:
        OlaError: not there; says where it was looked for and how to get it.
    """
    path = Path(config.weights)
    if path.is_dir():
        return path
    what = f"weights of teacher {config.teacher}"
    try:
        return Path(snapshot_download(config.weights, revision=config.revision, local_files_only=True))
    except HFValidationError:
        raise OlaError(
            f"{what}: no folder {path.resolve()}; it takes a folder or a hub id (the demo world's: `make teachers`)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError):
        revision = f" --revision {config.revision}" if config.revision else ""
        include = " ".join(f"'{pattern}'" for pattern in files)
        raise OlaError(
            f"{what}: neither a folder {path.resolve()} nor {config.weights!r} in the Hugging Face cache; "
            f"get them with `hf download {config.weights}{revision} --include {include}`, "
            "the demo world's with `make teachers`"
        ) from None


def read_architecture(file: Path) -> Any:
    """The configuration of a network, as the class transformers has for its ``model_type``, defaults filled in.

    Code that a repository brings along (``auto_map``, what ``trust_remote_code`` is about) is never looked at.

    Raises:
        OlaError: not there, no JSON, or a model that transformers does not have.
    """
    stated = _read_json(file)
    name: Any = stated.get("model_type")
    if name not in CONFIG_MAPPING:
        remote = "; code of its own (auto_map) is never run" if "auto_map" in stated else ""
        raise OlaError(f"{file}: model_type is {name!r}, which this transformers does not have{remote}")
    try:
        return CONFIG_MAPPING[name].from_dict(stated)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise OlaError(f"{file}: no configuration of a {name}: {_first_line(error)}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder in the hub's layout: one, or those an index names.

    Raises:
        OlaError: one is missing. Pickled weights are code, and refused.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    for name in names:
        if (folder / name).is_file():
            continue
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        hint = f"; {pickled[0]} is pickled and refused, see `python -m featurize safetensors --help`" if pickled else ""
        raise OlaError(f"{folder / name}: missing{hint}")
    return [folder / name for name in names]


def weights_hash(folder: Path) -> str:
    """Hash (16 bytes of blake2b, hex) over name, dtype, shape and bytes of every tensor, however the files are cut.

    Raises:
        OlaError: no safetensors there, or a torn file.
    """
    total = blake2b(digest_size=16)
    with ExitStack() as files:  # open until the end: to open one is to parse the list of all its tensors
        where: dict[str, Any] = {}
        for file in weight_files(folder):
            try:
                opened = files.enter_context(safe_open(file, "pt"))
            except SafetensorError as error:
                raise OlaError(f"{file}: torn or no safetensors file ({_first_line(error)}); fetch it again") from None
            where |= dict.fromkeys(opened.keys(), opened)
        for name in sorted(where):
            tensor = where[name].get_tensor(name)
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def architecture_hash(architecture: Any) -> str:
    """Hash (8 bytes of blake2b, hex) over what no tensor shows: activations, heads, epsilons …"""
    return blake2b(json.dumps(_stated(architecture), sort_keys=True).encode(), digest_size=8).hexdigest()


def _stated(architecture: Any) -> dict[str, Any]:
    """What is not the default of the configuration's class, whether the file spells defaults out or not.

    So a newer transformers, whose classes have more keys, finds the same.
    """
    defaults = type(architecture)().to_dict()
    stated = {"model_type": architecture.model_type}
    for name, value in architecture.to_dict().items():
        if isinstance(part := getattr(architecture, name, None), PreTrainedConfig):
            stated[name] = _stated(part)
        elif not (name.startswith("_") or name in _NAMES or (name in defaults and value == defaults[name])):
            stated[name] = value
    return stated


def _statistics(file: Path, processor: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, by which pixels in [0, 1] are normalised."""
    if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6 or processor.get("do_rescale") is False:
        raise OlaError(f"{file}: pixels are not rescaled by 1 / 255, which is all that is supported")
    if processor.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    found = [processor.get(key) for key in ("image_mean", "image_std")]
    if not all(isinstance(values, list) and len(values) == 3 for values in found):
        raise OlaError(f"{file}: image_mean and image_std are {found[0]} and {found[1]}; expected three numbers each")
    return found[0], found[1]  # type: ignore[return-value]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        return content
    except FileNotFoundError:
        raise OlaError(f"{file}: missing; a teacher's folder has the layout of its Hugging Face repository") from None
    except ValueError as error:
        raise OlaError(f"{file}: not JSON ({error})") from None
