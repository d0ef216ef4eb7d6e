"""What is known of images, from the published layouts: pairs of points, label maps and depth maps.

    folder/annotations.json   DA-2K's: {"images/indoor/a.jpg": [{"point1": [h, w], "point2": [h, w], "closer_point":
                              "point1"}, …]}, pixels from 0, images relative to the folder
    folder/images/a.jpg       an image, and of the same path and stem
    folder/labels/a.png       its label map: one channel, the class of every pixel
    folder/depths/a.png       its depth map: one channel of 16 bit, millimetres, 0 where unknown

A folder may hold any of these. Everything is checked when it is read, but pixels.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from olavlm.errors import OlaError

Array = NDArray[Any]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MILLIMETRES = 1000
_ORIENTATION = 0x0112  # EXIF: from 5 on, width and height are exchanged


@dataclass(frozen=True)
class Pairs:
    """The pairs of points of an image, all in pixels from its upper left corner: a pixel's centre is at a half."""

    first: Array  # (p, 2) x, y
    second: Array  # (p, 2)
    first_is_closer: Array  # (p,) bool


def load_pairs(folder: str | Path) -> dict[Path, Pairs]:
    """Image file → its pairs, in the order of ``annotations.json``.

    Raises:
        OlaError: no such file, not DA-2K's layout, an image that is not there, a point outside its image.
    """
    file = Path(folder) / "annotations.json"
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise OlaError(f"{file}: {error}; expected DA-2K's annotations") from None
    if not isinstance(content, dict) or not content:
        raise OlaError(f"{file}: expected an image's path → a list of its pairs, for one image at least")
    return {file.parent / name: _pairs(file, name, pairs) for name, pairs in content.items()}


def load_maps(folder: str | Path, kind: str) -> dict[Path, Path]:
    """Image file → its map of `kind` (``labels`` or ``depths``), in the order of their paths.

    Raises:
        OlaError: none there, a map without its image, or of another size than that.
    """
    maps = sorted((Path(folder) / kind).rglob("*.png"))
    if not maps:
        raise OlaError(f"{Path(folder) / kind}: no PNG there; expected the {kind} of the images beside it")
    found = {}
    for file in maps:
        stem = Path(folder) / "images" / file.relative_to(Path(folder) / kind).with_suffix("")
        image = next((path for suffix in SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()), None)
        if image is None:
            raise OlaError(f"{file}: no image {stem} beside it; expected one of {', '.join(SUFFIXES)}")
        if (size := image_size(file)) != image_size(image):
            raise OlaError(f"{file}: {_times(size)} pixels; expected those of {image}, {_times(image_size(image))}")
        found[image] = file
    return found


def list_images(folder: str | Path) -> list[Path]:
    """The images in a folder and those below it, in the order of their paths.

    Raises:
        OlaError: there is none.
    """
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise OlaError(f"{folder}: no image there; expected some of {', '.join(SUFFIXES)}")
    return found


def read_labels(file: Path, known: set[int], ignore: int) -> Array:
    """A label map (H, W) int64.

    Raises:
        OlaError: more than one channel, or a label that is neither known nor to be ignored.
    """
    labels = _read(file).astype(np.int64)
    if unknown := {*np.unique(labels).tolist()} - known - {ignore}:
        raise OlaError(
            f"{file}: label {min(unknown)}; expected {min(known)} to {max(known)}, the teacher's, or {ignore} (ignored)"
        )
    return labels


def read_depths(file: Path) -> Array:
    """A depth map (H, W) float64 in metres, 0 where unknown. Raises as `read_labels`."""
    return _read(file).astype(np.float64) / MILLIMETRES


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of an image, upright; no pixel is decoded.

    Raises:
        OlaError: no image there.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except (OSError, UnidentifiedImageError) as error:
        raise OlaError(f"{file}: {getattr(error, 'strerror', None) or 'not an image'}; expected an image") from None
    return (height, width) if turned else (width, height)


def _pairs(file: Path, name: str, pairs: Any) -> Pairs:
    """The pairs of one image, checked."""
    width, height = image_size(file.parent / name)
    points, closer = [], []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        where = f"{file}: {name}: pair {number}"
        if not isinstance(pair, dict) or pair.get("closer_point") not in ("point1", "point2"):
            raise OlaError(f"{where}: {pair!r}; expected point1, point2, and which of them is closer_point")
        for key in ("point1", "point2"):
            point = pair.get(key)
            if not isinstance(point, list) or len(point) != 2 or not all(isinstance(v, int | float) for v in point):
                raise OlaError(f"{where}: {key} is {point!r}; expected [row, column]")
            if not (0 <= point[0] < height and 0 <= point[1] < width):
                raise OlaError(f"{where}: {key} is {point}; expected [row, column] in {height} rows, {width} columns")
        points.append([[pair[key][1] + 0.5, pair[key][0] + 0.5] for key in ("point1", "point2")])
        closer.append(pair["closer_point"] == "point1")
    if not points:
        raise OlaError(f"{file}: {name}: no pairs; leave such images out")
    first, second = np.array(points, np.float64).transpose(1, 0, 2)
    return Pairs(first, second, np.array(closer))


def _read(file: Path) -> Array:
    """The one channel of an image."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise OlaError(f"{file}: {error}; expected a PNG of one channel") from None
    if pixels.ndim != 2:
        raise OlaError(f"{file}: {pixels.shape[-1]} channels; expected one")
    return pixels


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
