"""Images generated from image embeddings by diffusers' stable unCLIP, and what is measured of them."""

import io
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from featurize.teachers.base import Teacher
from olavlm.chat import load_image
from olavlm.config import UnclipConfig
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.bootstrap import bootstrap_mean
from olavlm.eval.frechet import frechet_distance
from olavlm.eval.truth import Array, list_images
from olavlm.model import cosine
from pipelines.probe_tasks.measures import Found, Source, as_cell, chunks


class ImageMeasures:
    """What is measured of the images generated from a task's embeddings.

    Raises:
        OlaError: a pipeline, images or Inception that cannot be had.
    """

    def __init__(
        self, settings: UnclipConfig, task: str, teacher: Teacher, folder: Path, batch: int, seed: int
    ) -> None:
        self._task, self._teacher, self._folder, self._batch = task, teacher, folder, batch
        self._unclip = Unclip(settings, teacher.config.width, teacher.dtype, teacher.device, seed)
        self._inception = Inception(settings.inception, teacher.device) if settings.inception else None

    @property
    def described(self) -> dict[str, dict[str, str]]:
        """Title and direction of every measure, by name."""
        title = f"{self._task}: cosine of the generated image's embedding to the image's own"
        measures = {f"{self._task}_similarity": {"title": title, "better": "higher"}}
        if self._inception:
            title = f"{self._task}: FID of the generated images"
            measures[f"{self._task}_fid"] = {"title": title, "better": "lower"}
        return measures

    def measure(self, name: str, source: Source) -> Found:
        """What is measured of a source's embeddings; the images are kept in ``<name>/<task>-<column>``."""
        embeddings: dict[str, list[Tensor]] = {}
        for chunk in chunks(self._unclip.files, self._batch, f"embeddings {name}"):
            for task, column, features in source([load_image(file) for file in chunk]):
                if task == self._task:
                    embeddings.setdefault(column, []).append(features[:, 0].float().cpu())
        found: Found = {measure: {} for measure in self.described}
        for column, parts in embeddings.items():
            folder = self._folder / quote(name, safe="") / f"{self._task}-{column}"
            pictures = self._unclip.generate(torch.cat(parts), folder, self._batch)
            close = bootstrap_mean(cosine(self._embed(pictures), self._own).tolist())
            found[f"{self._task}_similarity"][column] = as_cell(close, len(pictures))
            if self._inception:
                distance = frechet_distance(self._inception.features(pictures), self._real)
                found[f"{self._task}_fid"][column] = {"value": distance, "n": len(pictures)}
        return found

    def _embed(self, files: Sequence[Path]) -> Tensor:
        """The teacher's embeddings of image files, (n, 1, width)."""
        pixels = (self._teacher.preprocess(load_image(file))[None] for file in files)
        return torch.cat([self._teacher.encode(of_image).cpu() for of_image in pixels])

    @cached_property
    def _own(self) -> Tensor:
        return self._embed(self._unclip.files)

    @cached_property
    def _real(self) -> Array:
        assert self._inception
        return self._inception.features(self._unclip.files)


class Unclip:
    """A `StableUnCLIPImg2ImgPipeline`, given embeddings in place of an image; no prompt, no noise on the embeddings.

    An image's latent noise depends on the seed and its number only, so that pictures from another layer or student
    differ by what was predicted.

    Attributes:
        files: the images whose embeddings are predicted.
    """

    def __init__(self, settings: UnclipConfig, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        """Load the pipeline.

        Raises:
            OlaError: not there, not of that kind, or of embeddings of another width; no images.
        """
        from diffusers import StableUnCLIPImg2ImgPipeline
        from diffusers.utils import logging

        self.files = list_images(settings.images)[: settings.limit]
        self._root, self._steps, self._seed, self._device = Path(settings.images), settings.steps, seed, device
        logging.disable_progress_bar()
        try:
            pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(  # type: ignore[no-untyped-call]
                settings.pipeline,
                feature_extractor=None,  # no image goes in
                use_safetensors=True,
                local_files_only=True,
                dtype=dtype,
            )
        except (OSError, ValueError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OlaError(f"probe_tasks.unclip.pipeline: {settings.pipeline}: {reason}") from None
        if (found := pipeline.image_normalizer.config.embedding_dim) != width:
            raise OlaError(
                f"probe_tasks.unclip.pipeline: {settings.pipeline} takes embeddings of width {found}, the teacher's "
                f"have {width}"
            )
        self._pipeline: Any = pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)

    def generate(self, embeddings: Tensor, folder: Path, batch: int) -> list[Path]:
        """An image for the embedding (n, width) of every file, as PNGs in `folder`; those that are there are kept.

        A batch is always of the same files, whichever of them are missing: in another one sums may round otherwise.
        """
        pictures = [folder / f"{file.relative_to(self._root)}.png" for file in self.files]
        numbers = range(len(pictures))
        batches = [numbers[start : start + batch] for start in numbers[::batch]]
        wanted = [some for some in batches if not all(pictures[i].is_file() for i in some)]
        for some in track(wanted, f"generating {folder.parent.name}/{folder.name}"):
            generated = self._pipeline(
                prompt=[""] * len(some),
                image_embeds=embeddings[some.start : some.stop].to(self._device, self._pipeline.image_encoder.dtype),
                generator=[torch.Generator().manual_seed(self._seed + i) for i in some],
                num_inference_steps=self._steps,
            )
            for i, image in zip(some, generated.images, strict=True):
                if not pictures[i].is_file():
                    buffer = io.BytesIO()
                    image.save(buffer, "PNG")
                    replace(pictures[i], buffer.getvalue())
        return pictures


class Inception:
    """Inception's pooled features, by the TorchScript module that NVIDIA publishes for its metrics.

    Its interface: ``module(images, return_features=True)``, images (n, 3, H, W) uint8 of any size, which it resizes to
    299 × 299 itself, as FID's first implementation does; the result (n, 2048). TorchScript holds a graph of torch's
    operations and no Python, so that loading it runs nothing else; torchvision is not needed.
    """

    def __init__(self, file: str, device: torch.device) -> None:
        """Load the module.

        Raises:
            OlaError: not there, or no TorchScript.
        """
        self._file, self._device = file, device
        if not Path(file).is_file():
            raise OlaError(f"probe_tasks.unclip.inception: no file {file}; expected inception-2015-12-05.pt")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.load. is deprecated")  # these weights have no other form
            try:
                loaded: Any = torch.jit.load(file, map_location=device)  # type: ignore[no-untyped-call]
            except (RuntimeError, ValueError) as error:
                raise OlaError(f"{file}: no TorchScript file ({str(error).strip().splitlines()[0]})") from None
        self._module: Any = loaded.eval()

    @torch.inference_mode()
    def features(self, files: Sequence[Path]) -> Array:
        """(n, d) float64 of image files, one at a time: they may differ in size.

        Raises:
            OlaError: the module is of another interface.
        """
        return np.concatenate([self._of(load_image(file)) for file in files])

    def _of(self, image: Image.Image) -> Array:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self._device)
        try:
            found = self._module(pixels, return_features=True)
        except RuntimeError as error:
            raise OlaError(
                f"{self._file}: does not take uint8 images and return_features=True, as Inception for FID does "
                f"({str(error).strip().splitlines()[-1]})"
            ) from None
        return np.asarray(found.reshape(1, -1).double().cpu().numpy())
