"""The commands `measure` and `safetensors` of ``python -m featurize``."""

import argparse
import tempfile
from pathlib import Path

from olavlm.cli import Command, human_bytes
from olavlm.config import load_pipeline
from olavlm.errors import OlaError

_MEASURE = "what a pipeline's teachers cost here: memory, seconds and GFLOP per image"
_SAFETENSORS = (
    "make model.safetensors of a folder's pytorch_model.bin; only tensors are unpickled, anything else is refused"
)


def add_commands(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add `measure` and `safetensors`; the parsed arguments carry the function to call as `command`."""
    measured = commands.add_parser("measure", help=_MEASURE, description=_MEASURE)
    measured.add_argument("pipeline", help="a name under pipelines/ or the path of a YAML file")
    measured.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key of the pipeline")
    measured.add_argument("--image", type=Path, metavar="FILE", help="a photograph (default: noise; costs the same)")
    measured.add_argument("--batch", type=int, default=1, metavar="N", help="images a forward pass (%(default)s)")
    measured.add_argument(
        "--random-weights", action="store_true", help="download nothing: the published sizes with random weights"
    )
    measured.set_defaults(command=_measure)
    converted = commands.add_parser("safetensors", help=_SAFETENSORS, description=_SAFETENSORS)
    converted.add_argument("folder", type=Path)
    converted.set_defaults(command=_safetensors)


def _measure(args: argparse.Namespace) -> None:
    import torch
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

    from featurize.teachers.measure import measure
    from featurize.teachers.published import write_random
    from olavlm.data.images import decode_image

    config = load_pipeline(args.pipeline, args.overrides)
    image = Image.effect_noise((640, 480), 64).convert("RGB")
    if args.image:
        try:
            image = decode_image(args.image.read_bytes())
        except (FileNotFoundError, IsADirectoryError, ValueError) as error:
            raise OlaError(f"--image {args.image}: {error}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        "task", "teacher", "parameters", "target", "memory", "s / image", "GFLOP / image", "stated", "GFLOP / s",
        title=f"{where}, batch of {args.batch}",
    )  # fmt: skip
    for task, stated in config.teachers.items():
        with tempfile.TemporaryDirectory(prefix="olavlm-random-") as folder:
            teacher = stated
            if args.random_weights:
                write_random(stated.weights, Path(folder))
                teacher = stated.model_copy(update={"weights": folder, "revision": None})
            cost = measure(teacher, image, args.batch, device)
        table.add_row(
            task,
            f"{stated.teacher}, {stated.dtype}\n{stated.weights}",
            f"{cost.parameters / 1e6:.0f} M",
            f"{cost.tokens} × {cost.width}",
            human_bytes(cost.memory),
            f"{cost.seconds:.3g}",
            f"{cost.gflop:.4g}",
            "" if stated.gflop_per_image is None else f"{stated.gflop_per_image:g}",
            f"{cost.gflop / cost.seconds:.3g}",
        )
    Console().print(table)


def _safetensors(args: argparse.Namespace) -> None:
    from olavlm.model.tensor_files import TensorFiles, write_tensors

    files = TensorFiles(args.folder)
    if any(file.suffix == ".safetensors" for file in files.files):
        raise OlaError(f"{args.folder}: has safetensors already")
    write_tensors(args.folder, files.read(files.shapes))
    print(f"{args.folder}: {len(files.shapes)} tensors are safetensors now")
