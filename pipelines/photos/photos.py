"""Photographs that scikit-image and scikit-learn carry in their wheels, as LLaVA JSON with words written for them.

Landscape and square, colour and grey, JPEG and PNG; one PNG with an alpha channel is made here, from the flower and an
oval vignette, because no photograph in the two packages has one. ``china.jpg`` (danielbuechele) and ``flower.jpg``
(vultilion), both from flickr.com, are CC BY 2.0; the origin of the others is in scikit-image's own notes.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from olavlm.errors import OlaError

DESCRIBE = ["Describe the image.", "What does this photograph show?", "Give a short caption of the picture."]


def write_llava_json(out: Path) -> Path:
    """Copy the photographs to ``out/images`` and write ``out/photos.json``; the same packages give the same files.

    Every photograph gives one sample per caption, and one with its questions and answers as turns of a conversation.

    Returns:
        The JSON file; its image paths are relative to `out`.

    Raises:
        OlaError: scikit-image or scikit-learn is not installed, or lacks a file.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    photos = json.loads(Path(__file__).with_name("photos.json").read_text(encoding="utf-8"))
    samples = [sample for photo in photos for sample in _samples(photo, _copy(photo, out))]
    file = out / "photos.json"
    file.write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def _samples(photo: dict[str, Any], image: str) -> list[dict[str, Any]]:
    """One sample per caption, and one conversation."""
    captioned = zip(DESCRIBE, photo["captions"], strict=False)  # at most one caption per way to ask
    conversations = [[(f"<image>\n{question}", caption)] for question, caption in captioned]
    (first, answer), *rest = photo["questions"]
    conversations.append([(f"<image>\n{first}", answer), *rest])
    return [
        {
            "id": f"{photo['id']}-{number}",
            "image": image,
            "conversations": [
                {"from": who, "value": value}
                for turn in turns
                for who, value in zip(("human", "gpt"), turn, strict=True)
            ],
        }
        for number, turns in enumerate(conversations)
    ]


def _copy(photo: dict[str, Any], out: Path) -> str:
    """Put a photograph into ``out/images``; its path relative to `out`."""
    spec = importlib.util.find_spec(photo["package"])
    source = Path(spec.origin).parent / photo["file"] if spec and spec.origin else None
    if not (source and source.is_file()):
        name = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photo["package"]]
        raise OlaError(f"photograph {photo['file']} of {name}: not installed; pip install '.[eval]' brings it")
    if photo.get("vignette"):
        name = f"images/{photo['id']}.png"
        _vignette(Image.open(source)).save(out / name)
    else:
        name = f"images/{photo['id']}{source.suffix}"
        shutil.copyfile(source, out / name)
    return name


def _vignette(image: Image.Image) -> Image.Image:
    """The photograph with an alpha channel: opaque in the middle, an oval whose edge fades to nothing."""
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    alpha = np.clip((1 - np.hypot(x, y)) * 4, 0, 1)
    faded = image.convert("RGB")
    faded.putalpha(Image.fromarray((alpha * 255).astype(np.uint8)))
    return faded
