"""Weights in the hub's layouts: shapes at once, values one at a time, written shard by shard.

A model of any size passes through the memory of one source file and one shard.
"""

import json
import pickle
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olavlm.errors import OlaError

#: Where weights are looked for, in this order; an index names the files of a sharded checkpoint. The last is all that
#: the published code writes where it saves the projector alone.
LAYOUTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "mm_projector.bin",
)
SHARD_BYTES = 2_000_000_000


class TensorFiles:
    """The tensors of a folder.

    Args:
        folder: holds one of `LAYOUTS`. ``.bin`` is read through ``torch.load(weights_only=True)`` only.

    Raises:
        OlaError: no weights, a file missing, damaged or with more than tensors in it, an index that does not match.
    """

    def __init__(self, folder: Path) -> None:
        first = next((folder / name for name in LAYOUTS if (folder / name).is_file()), None)
        if first is None:
            raise OlaError(f"{folder}: no weights here; expected one of {', '.join(LAYOUTS)}")
        index = _read_index(first) if first.suffix == ".json" else None
        self.files = sorted({folder / file for file in index.values()}) if index else [first]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            with _opened(file) as tensors:
                for name, tensor in tensors.items():
                    if name in self.shapes:
                        raise OlaError(f"{file}: {name} lies in another file of the checkpoint as well")
                    self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
        if index and index.keys() != self.shapes.keys():
            stray = min(index.keys() ^ self.shapes.keys())
            raise OlaError(f"{first}: {stray} is {'named here but in no file' if stray in index else 'not named here'}")

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, in the order of the files."""
        for file in self.files:
            with _opened(file) as tensors:
                for name in tensors:
                    if name in names:
                        yield name, tensors[name].clone()  # out of the mapped file


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as ``save_pretrained`` lays them out, holding at most one shard in memory.

    Args:
        folder: gets ``model.safetensors``, or ``model-0000i-of-0000n.safetensors`` and their index.
        tensors: names and values, consumed once.
        shard_bytes: a shard ends before the tensor that would make it larger.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    elements = total = size = 0

    def flush() -> None:
        save_file(waiting, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        waiting[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        elements += tensor.numel()
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_parameters": elements, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _read_index(file: Path) -> dict[str, str]:
    """``weight_map``: tensor → file name."""
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        return {str(name): str(part) for name, part in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OlaError(f"{file}: not an index of weights; expected JSON with a weight_map") from None


class _SafeTensors(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when asked for it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.offset_keys())

    def __len__(self) -> int:
        return len(self._file.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of one file, mapped into memory wherever its format allows."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                yield _SafeTensors(opened)
        else:
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
                raise OlaError(f"{file}: not a dictionary of tensors")
            yield loaded
    except FileNotFoundError:
        raise OlaError(f"{file}: missing; the index names it") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OlaError(f"{file}: cannot be read, it is damaged or holds more than tensors: {reason}") from None
