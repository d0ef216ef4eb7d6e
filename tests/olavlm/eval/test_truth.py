"""DA-2K's pairs, label maps and depth maps from disk, and what is said about those that are not right."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from olavlm.errors import OlaError
from olavlm.eval.truth import list_images, load_maps, load_pairs, read_depths, read_labels

PAIR = {"point1": [0, 3], "point2": [9, 19], "closer_point": "point2"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of 20 × 10, one of them in a folder of its own and turned by its EXIF, with all that is known."""
    (tmp_path / "images" / "indoor").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (10, 20)).save(tmp_path / "images" / "indoor" / "a.jpg", exif=turned)
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "b.png")
    for kind, values in {"labels": np.uint8([0, 1, 2, 255]), "depths": np.uint16([0, 1500, 40000, 1])}.items():
        (tmp_path / kind / "indoor").mkdir(parents=True)
        for name in ("indoor/a", "b"):
            Image.fromarray(np.resize(values, (10, 20))).save(tmp_path / kind / f"{name}.png")
    annotate(tmp_path, {"images/indoor/a.jpg": [PAIR], "images/b.png": [PAIR, {**PAIR, "closer_point": "point1"}]})
    return tmp_path


def annotate(folder: Path, content: Any) -> None:
    (folder / "annotations.json").write_text(json.dumps(content))


def test_pairs_are_read_as_published_rows_before_columns(folder: Path) -> None:
    found = load_pairs(folder)
    assert list(found) == [folder / "images/indoor/a.jpg", folder / "images/b.png"]
    pairs = found[folder / "images/b.png"]
    assert pairs.first.tolist() == [[3.5, 0.5]] * 2  # x, y of the pixel's centre
    assert pairs.second.tolist() == [[19.5, 9.5]] * 2
    assert pairs.first_is_closer.tolist() == [False, True]


def test_maps_are_found_by_their_images_path_and_stem(folder: Path) -> None:
    found = load_maps(folder, "labels")
    assert found == {
        folder / "images/b.png": folder / "labels/b.png",
        folder / "images/indoor/a.jpg": folder / "labels/indoor/a.png",
    }
    assert read_labels(folder / "labels/b.png", {0, 1, 2}, 255).shape == (10, 20)
    assert read_depths(folder / "depths/b.png")[0, :4] == pytest.approx([0, 1.5, 40, 0.001])
    assert list_images(folder / "images") == sorted(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an image's path → a list of its pairs"),
        ({"images/none.jpg": [PAIR]}, "images/none.jpg: No such file"),
        ({"annotations.json": [PAIR]}, "annotations.json: not an image"),
        ({"images/b.png": []}, "images/b.png: no pairs"),
        ({"images/b.png": [PAIR, {**PAIR, "point1": [10, 0]}]}, r"b.png: pair 1: point1 is \[10, 0\]; .* in 10 rows"),
        ({"images/b.png": [{**PAIR, "point2": [0, -1]}]}, r"point2 is \[0, -1\]"),
        ({"images/b.png": [{**PAIR, "point2": "here"}]}, "point2 is 'here'"),
        ({"images/b.png": [{**PAIR, "closer_point": "point3"}]}, "which of them is closer_point"),
    ],
)
def test_bad_annotations_are_named(folder: Path, content: Any, message: str) -> None:
    annotate(folder, content)
    with pytest.raises(OlaError, match=message) as error:
        load_pairs(folder)
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(OlaError, match=r"annotations\.json: .*No such file"):
        load_pairs(folder / "labels")
    with pytest.raises(OlaError, match="masks: no PNG there"):
        load_maps(folder, "masks")
    with pytest.raises(OlaError, match="no image there"):
        list_images(folder / "nowhere")


def test_a_map_without_its_image_or_of_another_size_is_named(folder: Path) -> None:
    Image.new("L", (21, 10)).save(folder / "labels" / "b.png")
    with pytest.raises(OlaError, match=r"b\.png: 21 × 10 pixels; expected those of .*b\.png, 20 × 10"):
        load_maps(folder, "labels")
    (folder / "images" / "b.png").unlink()
    with pytest.raises(OlaError, match=r"labels/b\.png: no image .*images/b beside it"):
        load_maps(folder, "labels")


def test_labels_that_nobody_knows_and_colours_are_named(folder: Path) -> None:
    file = folder / "labels" / "b.png"
    with pytest.raises(OlaError, match=rf"{re.escape(str(file))}: label 2; expected 0 to 1, the teacher's, or 255"):
        read_labels(file, {0, 1}, 255)
    Image.new("RGB", (20, 10)).save(file)
    with pytest.raises(OlaError, match="3 channels; expected one"):
        read_labels(file, {0, 1}, 255)
