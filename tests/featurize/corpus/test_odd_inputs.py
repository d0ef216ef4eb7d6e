"""The table of odd inputs (README, Your images): each has one outcome, whether it is packed or adopted."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurize.corpus import adopt, pack_llava_json
from olavlm.data.corpus import Corpus, conversation

RNG = np.random.default_rng(0)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)).convert(mode)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # by 90° clockwise
    return exif


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 30,000 × 30,000."""
    data = bytearray(encode(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">2I", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def frames(kind: str) -> bytes:
    return encode(noise("P" if kind == "GIF" else "RGB"), kind, save_all=True, append_images=[noise("P")])


#: What is usable: name → bytes, how packing stores it (None: as it is, under this extension), width, height.
USABLE = {
    "CMYK": (encode(noise("CMYK"), "JPEG"), "jpg", 12, 8),
    "grey": (encode(noise("L"), "JPEG"), "jpg", 12, 8),
    "16-bit": (encode(Image.fromarray(np.full((8, 12), 40_000, np.uint16)), "PNG"), "png", 12, 8),
    "palette": (encode(noise("P"), "PNG", transparency=0), "png", 12, 8),
    "EXIF-rotated": (encode(noise(), "JPEG", exif=turned()), "jpg", 8, 12),
    "animated WebP": (frames("WEBP"), "webp", 12, 8),
    "animated GIF": (frames("GIF"), "png!", 12, 8),
    "TIFF": (encode(noise("CMYK"), "TIFF"), "png!", 12, 8),
    "damaged EXIF": (encode(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), "jpg", 12, 8),
}
#: What is not: name → bytes, reason.
UNUSABLE = {
    "zero bytes": (b"", "empty file (0 bytes)"),
    "truncated": (encode(noise().resize((99, 99)), "JPEG")[:1500], "cannot be decoded: image file is truncated"),
    "no image": (b"<html>404 Not Found</html>", "not an image in a known format"),
    "bomb": (bomb(), "more than 89478485 pixels"),
}


def llava(images: int = 1) -> dict:
    turns = [{"from": "human", "value": "<image>" * images + "?"}, {"from": "gpt", "value": "!"}]
    return {"conversations": turns}


def packed(folder: Path, data: bytes, name: str) -> tuple[Corpus, list]:
    """A corpus packed of this image and a good one."""
    (folder / name).write_bytes(data)
    (folder / "good.png").write_bytes(encode(noise(), "PNG"))
    samples = [{"id": "odd", "image": name, **llava()}, {"id": "good", "image": "good.png", **llava()}]
    (folder / "samples.json").write_text(json.dumps(samples))
    report = pack_llava_json(folder / "samples.json", [folder], folder / "packed")
    return Corpus.open(folder / "packed"), report.left_out


def adopted(folder: Path, data: bytes, name: str) -> tuple[Corpus, list]:
    """A corpus adopted of a tar with this image and a good one."""
    with tarfile.open(folder / "t.tar", "w") as tar:
        text = json.dumps(llava()).encode()
        for member, content in (
            *((name, data), (f"{Path(name).stem}.json", text)),
            *(("good.png", encode(noise(), "PNG")), ("good.json", text)),
        ):
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    report = adopt([folder / "t.tar"], folder / "adopted")
    return Corpus.open(folder / "adopted"), report.left_out


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", ["odd.jpg", "odd.png", "odd.gif"])  # what the name says does not matter
@pytest.mark.parametrize("kind", USABLE)
def test_an_odd_image_is_used(tmp_path, kind, name):
    data, stored, width, height = USABLE[kind]
    for make in (packed, adopted):
        corpus, left_out = make(tmp_path, data, name)
        assert left_out == []
        row = next(row for row in corpus.index(corpus.tars[0]).to_pylist() if row["key"] == "odd")
        assert (row["error"], row["width"], row["height"]) == (None, width, height)
        found = corpus.read(corpus.tars[0], row["image_offset"], row["image_bytes"])
        converted = make is packed and stored.endswith("!")
        assert (found == data) != converted
        if make is packed:
            with tarfile.open(corpus.tar_path(corpus.tars[0])) as tar:
                assert tar.getnames()[0] == f"odd.{stored.removesuffix('!')}"


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_image_is_named(tmp_path, kind):
    data, reason = UNUSABLE[kind]
    for make in (packed, adopted):
        corpus, (issue,) = make(tmp_path, data, "odd.jpg")
        assert (issue.key, issue.file) == ("odd", "odd.jpg")
        assert issue.reason.startswith(reason)
        errors = {row["key"]: row["error"] for row in corpus.index(corpus.tars[0]).to_pylist()}
        assert errors == ({"good": None} if make is packed else {"odd": issue.reason, "good": None})


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


def test_the_quirks_of_llava_665k(tmp_path, keys):
    """Several image roots, ids that are numbers or taken, rows without an image, and what LLaVA's own code mends."""
    roots = [tmp_path / "data", tmp_path / "more"]
    for root, name in (
        (0, "coco/train2017/000000000009.jpg"),
        (0, "gqa/images/9.jpg"),
        (1, "ocr_vqa/images/9.jpg"),
        (1, "textvqa/train_images/ä b.jpg"),
        (0, "vg/VG_100K/9.jpg"),
        (1, "vg/VG_100K_2/9.jpg"),
    ):
        file = roots[root] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(noise("P"), "GIF") if "ocr" in name else encode(noise(), "JPEG"))
    one = turns("<image>\nWhat?", "A dot.")
    coco = "coco/train2017/000000000009.jpg"
    many = turns("<image>\nWhat?", *["More."] * 79)
    samples = [
        {"id": "000000000009", "image": coco, "conversations": one},
        {"id": "000000000009", "image": coco, "conversations": turns("Where?\n<image>", "Here.")},  # another task's
        {"id": "000000000009", "image": coco, "conversations": one},  # twice the same
        {"id": 9, "image": "gqa/images/9.jpg", "conversations": one},
        {"id": "9", "image": "ocr_vqa/images/9.jpg", "conversations": one},  # a GIF that is called .jpg
        {"id": "ä/b.c", "image": "textvqa/train_images/ä b.jpg", "conversations": many},
        {"id": "VG_100K_2/9", "image": "vg/VG_100K_2/9.jpg", "conversations": [*one, {"from": "human", "value": "?"}]},
        {"id": "wNBG8Gp_0", "model": "", "conversations": turns("Welcome.", "Hi", "Hello", first="gpt")},
        {"image": None, "conversations": turns("Hi", "Hello")},
        {"id": "html", "conversations": turns("What is the tag <image> for?", "SVG.")},
        {"id": "blind", "image": coco, "conversations": turns("What?", "A dot.")},
        {"id": "system", "conversations": [{"from": "system", "value": "Be kind."}, *turns("Hi", "Hello")]},
        {"id": "mute", "image": coco, "conversations": turns("<image>\nWhat?")},
        {"id": "ocr_vqa/2", "image": "ocr_vqa/images/2.jpg", "conversations": one},
    ]
    (tmp_path / "mix.json").write_text("\ufeff" + json.dumps(samples, indent=1, ensure_ascii=False))
    report = pack_llava_json(tmp_path / "mix.json", roots, tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    found = keys(corpus)
    assert [key.partition("-")[0] for key in found] == [
        *("000000000009", "000000000009", "9", "9", "ä_b_c", "VG_100K_2_9", "wNBG8Gp_0", "000000008"),
    ]
    assert len(set(found)) == len(found) == report.samples == 8
    assert [issue.key for issue in report.renamed] == ["000000000009", "9"]
    assert {issue.key: issue.reason for issue in report.left_out} == {
        "000000000009": "duplicate of a sample in the same source",
        "html": "0 images, but 1 times <image> in the conversation",
        "blind": "1 images, but 0 times <image> in the conversation",
        "system": "turn 0: expected from (human or gpt) and value, found {'from': 'system', 'value': 'Be kind.'}",
        "mute": "no answer of gpt in the conversation",
        "ocr_vqa/2": f"not found in {roots[0]}, {roots[1]}",
    }
    rows = corpus.index(corpus.tars[0]).to_pylist()
    said = [conversation("json", corpus.read(corpus.tars[0], r["text_offset"], r["text_bytes"])) for r in rows]
    assert said[1][0]["value"] == "<image>\nWhere?"
    assert len(said[4]) == 80
    assert [turn["value"] for turn in said[6]] == ["Hi", "Hello"]


def test_half_a_surrogate_pair_never_reaches_the_corpus(tmp_path):
    """It is no Unicode. The parser of lists reads it as a question mark, a line that holds one is left out."""
    rows = [{"id": "half", "conversations": turns("\ud83d", "!")}, {"id": "good", "conversations": turns("Hi", "!")}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert pack_llava_json(tmp_path / "a.json", [tmp_path], tmp_path / "list").left_out == []
    corpus = Corpus.open(tmp_path / "list")
    row = corpus.index(corpus.tars[0]).to_pylist()[0]
    text = corpus.read(corpus.tars[0], row["text_offset"], row["text_bytes"])
    assert conversation("json", text)[0]["value"] == "?"
    (issue,) = pack_llava_json(tmp_path / "a.jsonl", [tmp_path], tmp_path / "lines").left_out
    assert (issue.key, "surrogates not allowed" in issue.reason) == ("half", True)
