import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featurize.corpus import pack_llava_json
from olavlm.data import files
from olavlm.data.corpus import INDEX_SCHEMA, Corpus, content_hash, conversation, file_hash
from olavlm.errors import OlaError


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Eight samples in three tars; the last has two images, the one before none."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (8 + i, 10, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        samples.append({"id": f"s{i}", "image": f"{i}.png", "conversations": talk("<image>\nWhat?", f"Thing {i}.")})
    samples[6] = {"id": "text", "conversations": talk("Hi", "Hello")}
    samples.append({"id": "two", "image": ["1.png", "2.png"], "conversations": talk("<image> or <image>?", "Both.")})
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    pack_llava_json(tmp_path / "samples.json", [tmp_path], tmp_path / "corpus", samples_per_tar=3)
    return Corpus.open(tmp_path / "corpus")


def test_the_index_says_what_is_in_the_tars(corpus):
    assert [(tar.name, tar.samples, tar.images) for tar in corpus.tars] == [
        ("000000", 3, 3),
        ("000001", 3, 3),
        ("000002", 2, 2),
    ]
    last = corpus.index(corpus.tar("000002"))
    assert last.schema.equals(INDEX_SCHEMA)
    rows = last.to_pylist()
    assert [(row["key"], row["image_index"], row["modality"]) for row in rows] == [
        ("text", -1, "text"),
        ("two", 0, "image"),
        ("two", 1, "image"),
    ]
    assert rows[0] | {"text_offset": 0, "text_bytes": 0} == {
        "key": "text",
        "image_index": -1,
        "modality": "text",
        "image_offset": 0,
        "image_bytes": 0,
        "image_hash": None,
        "width": 0,
        "height": 0,
        "error": None,
        "text_member": "json",
        "text_offset": 0,
        "text_bytes": 0,
        "text_length": len("HiHello"),
    }
    assert [(row["width"], row["height"]) for row in rows[1:]] == [(10, 9), (10, 10)]


def test_byte_ranges_give_the_image_and_the_text(corpus):
    for tar in corpus.tars:
        for row in corpus.index(tar).to_pylist():
            text = corpus.read(tar, row["text_offset"], row["text_bytes"])
            turns = conversation(row["text_member"], text)
            assert sum(len(turn["value"]) for turn in turns) == row["text_length"]
            if row["image_index"] >= 0:
                data = corpus.read(tar, row["image_offset"], row["image_bytes"])
                assert content_hash(data) == row["image_hash"]
                assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])


def test_threads_read_from_more_tars_than_stay_open(corpus, monkeypatch):
    monkeypatch.setattr(files, "STAY_OPEN", 1)
    wanted = [(tar, offset) for tar in corpus.tars for offset in range(0, 4096, 64)] * 4
    expected = {tar.name: corpus.tar_path(tar).read_bytes() for tar in corpus.tars}
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda w: corpus.read(w[0], w[1], 100), wanted))
    assert read == [expected[tar.name][offset : offset + 100] for tar, offset in wanted]


def test_a_cut_tar_is_refused_by_name(corpus):
    tar = corpus.tars[1]
    path = corpus.tar_path(tar)
    path.write_bytes(path.read_bytes()[: tar.bytes // 2])
    with pytest.raises(OlaError, match=r"000001\.tar: \d+ bytes, \d+ when it was indexed"):
        corpus.read(tar, 0, 10)
    corpus.read(corpus.tars[0], 0, 10)


def test_a_range_beyond_the_end_is_refused(corpus):
    tar = corpus.tars[0]
    with pytest.raises(OlaError, match=rf"10 bytes at offset {tar.bytes - 10}, expected 11"):
        corpus.read(tar, tar.bytes - 10, 11)


def test_a_missing_tar_is_refused_by_name(corpus):
    corpus.tar_path(corpus.tars[0]).unlink()
    for use in (lambda tar: corpus.read(tar, 0, 1), corpus.verify_tar):
        with pytest.raises(OlaError, match=r"000000\.tar.*No such file"):
            use(corpus.tars[0])


def test_verify_finds_one_changed_byte(corpus):
    tar = corpus.tars[0]
    corpus.verify_tar(tar)
    data = bytearray(corpus.tar_path(tar).read_bytes())
    data[1000] ^= 1
    corpus.tar_path(tar).write_bytes(data)
    with pytest.raises(OlaError, match="changed since it was indexed"):
        corpus.verify_tar(tar)


def test_an_unfinished_corpus_is_no_corpus(corpus):
    (corpus.path / "corpus.json").unlink()
    with pytest.raises(OlaError, match=r"no corpus in .*not finished"):
        Corpus.open(corpus.path)
    with pytest.raises(OlaError, match="no such folder"):
        Corpus.open(corpus.path / "elsewhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 99, "id": "x"}', "schema version 99"),
        ("{", "not a corpus manifest"),
        ("[]", "not a corpus manifest"),
    ],
)
def test_another_manifest_is_refused(corpus, content, message):
    (corpus.path / "corpus.json").write_text(content)
    with pytest.raises(OlaError, match=message):
        Corpus.open(corpus.path)


def test_damaged_lists_are_refused_by_name(corpus):
    index = corpus.path / "index" / "000000.parquet"
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(OlaError, match=r"000000\.parquet: damaged"):
        corpus.index(corpus.tars[0])
    index.unlink()
    with pytest.raises(OlaError, match=r"000000\.parquet: missing"):
        corpus.index(corpus.tars[0])
    index.mkdir()
    with pytest.raises(OlaError, match=r"000000\.parquet: cannot be read \(Is a directory\)"):
        corpus.index(corpus.tars[0])
    (corpus.path / "tars.parquet").write_bytes((corpus.path / "index" / "000001.parquet").read_bytes())
    with pytest.raises(OlaError, match=r"tars\.parquet: columns"):
        Corpus.open(corpus.path)


def test_the_index_of_another_tar_is_refused(corpus):
    index = corpus.path / "index"
    (index / "000000.parquet").write_bytes((index / "000001.parquet").read_bytes())
    with pytest.raises(OlaError, match=r"000000\.parquet: made of a tar with hash"):
        corpus.index(corpus.tars[0])


def test_an_unknown_tar_is_refused(corpus):
    with pytest.raises(OlaError, match="no tar named 'nope'"):
        corpus.tar("nope")


def test_a_caption_becomes_one_turn_about_the_image():
    assert conversation("txt", " Ein Käse\n".encode()) == talk("<image>", "Ein Käse")


def test_a_leading_answer_is_dropped():
    given = [{"from": "gpt", "value": "Welcome."}, *talk("Hi", "Hello")]
    assert conversation("json", json.dumps({"conversations": given}).encode()) == talk("Hi", "Hello")


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", "<image> What is it?"])
def test_the_image_of_a_turn_goes_to_its_front(question):
    given = talk("Hi", "Hello", question, "A dot.")
    turns = conversation("json", json.dumps({"conversations": given}).encode())
    assert turns == talk("Hi", "Hello", "<image>\nWhat is it?", "A dot.")


def test_several_images_of_a_turn_stay_in_their_places():
    given = talk("Is <image> in <image>?", "No.")
    assert conversation("json", json.dumps({"conversations": given}).encode()) == given


@pytest.mark.parametrize(
    ("member", "data", "reason"),
    [
        ("txt", b"  \n", "empty caption"),
        ("txt", b"\xff\xfe", "not UTF-8"),
        ("json", b"{", "not JSON"),
        ("json", b"[" * 100_000, "not JSON"),
        ("json", b"[]", "no list of conversations"),
        ("json", b'{"conversations": "hi"}', "no list of conversations"),
        ("json", b'{"conversations": []}', "no answer"),
        ("json", b'{"conversations": [{"from": "human", "value": "hi"}]}', "no answer"),
        ("json", b'{"conversations": [{"from": "user", "value": "hi"}]}', "turn 0: expected from"),
        ("json", b'{"conversations": [{"from": "human", "value": 3}]}', "turn 0: expected from"),
    ],
)
def test_what_is_no_conversation_has_a_reason(member, data, reason):
    with pytest.raises(ValueError, match=reason):
        conversation(member, data)


def test_turns_must_alternate():
    twice = [{"from": "human", "value": "a"}] * 2
    with pytest.raises(ValueError, match="alternate"):
        conversation("json", json.dumps({"conversations": twice}).encode())


@given(st.binary(max_size=4096))
def test_file_hash_is_content_hash(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("hash") / "file"
    file.write_bytes(data)
    assert file_hash(file) == content_hash(data)
    assert len(content_hash(data)) == 32
