import json

import pytest
from PIL import Image

from featurize.corpus import pack_llava_json
from olavlm.errors import OlaError
from pipelines.photos.photos import write_llava_json


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_llava_json(tmp_path_factory.mktemp("photos"))


def test_every_photograph_packs(written, tmp_path):
    report = pack_llava_json(written, [written.parent], tmp_path / "corpus", samples_per_tar=8)
    samples = json.loads(written.read_text())
    assert report.left_out == []
    assert report.renamed == []
    assert report.samples == len(samples) == 51


def test_there_are_all_kinds_of_images(written):
    images = [Image.open(path) for path in sorted((written.parent / "images").iterdir())]
    assert len(images) == 13
    assert {"L", "RGB", "RGBA"} <= {image.mode for image in images}
    assert {"JPEG", "PNG"} == {image.format for image in images}
    assert sum(image.width != image.height for image in images) >= 6
    for image in images:
        image.close()


def test_every_photograph_has_captions_and_a_conversation(written):
    by_image: dict[str, list[int]] = {}
    for sample in json.loads(written.read_text()):
        assert (written.parent / sample["image"]).is_file()
        assert sample["conversations"][0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in sample["conversations"]) == 1
        by_image.setdefault(sample["image"], []).append(len(sample["conversations"]))
    assert all(lengths[:2] == [2, 2] and lengths[-1] >= 4 for lengths in by_image.values())


def test_the_same_packages_give_the_same_files(written, tmp_path):
    again = write_llava_json(tmp_path)
    for path in written.parent.rglob("*.*"):
        assert (again.parent / path.relative_to(written.parent)).read_bytes() == path.read_bytes()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OlaError, match=r"astronaut\.png of scikit-image: not installed; pip install"):
        write_llava_json(tmp_path)
