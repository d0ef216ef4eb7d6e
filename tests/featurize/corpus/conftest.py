import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


class Source:
    """A folder of random images and LLaVA JSON about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        self.json = folder / "samples.json"
        self.samples: list[object] = []

    def image(self, name: str) -> str:
        """A new image; its bytes follow from its name."""
        rng = np.random.default_rng(list(name.encode()))
        pixels = rng.integers(0, 256, (6 + len(name), 9, 3), dtype=np.uint8)
        (self.images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(self.images / name)
        return name

    def add(self, key: object, *images: str, **more: object) -> None:
        """A sample about images that are (or are not) there."""
        image = {} if not images else {"image": images[0] if len(images) == 1 else list(images)}
        turns = talk("<image>" * len(images) + "What?", f"Thing {key}.")
        self.samples.append({"id": key, **image, "conversations": turns, **more})

    def add_many(self, numbers: range) -> None:
        for i in numbers:
            self.add(f"s{i}", self.image(f"{i}.jpg"))

    def write(self) -> Path:
        self.json.write_text(json.dumps(self.samples))
        return self.json


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "source")


@pytest.fixture
def contents():
    """Every file below a folder with its bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture
def keys():
    """The keys of a corpus' samples, in order."""

    def read(corpus) -> list[str]:
        listed = [key for tar in corpus.tars for key in corpus.index(tar).column("key").to_pylist()]
        return list(dict.fromkeys(listed))

    return read
