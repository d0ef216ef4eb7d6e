import json
import os
import tarfile
import tracemalloc
from contextlib import closing

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from featurize.corpus import build, pack_caption_folder, pack_llava_json
from featurize.corpus.samples import in_order, safe_key
from olavlm.config import CaptionFolderSource, LlavaJsonSource
from olavlm.data.corpus import Corpus, conversation
from olavlm.errors import OlaError


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_the_same_input_gives_the_same_bytes_whatever_the_workers(source, tmp_path, contents):
    source.add_many(range(23))
    source.add("twin", "0.jpg")
    source.add("twin", "1.jpg")
    source.add("gone", "gone.jpg")
    source.write()
    one, two = (
        pack_llava_json(source.json, [source.images], tmp_path / f"{workers}", 5, workers=workers) for workers in (1, 2)
    )
    assert contents(one.out) == contents(two.out)
    assert (one.tars, one.samples) == (5, 25)


def test_members_are_contiguous_and_carry_no_owner_and_no_time(source, tmp_path):
    source.add_many(range(3))
    source.add("two", "0.jpg", "1.jpg")
    pack_llava_json(source.write(), [source.images], tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    with tarfile.open(corpus.tar_path(corpus.tars[0])) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        *("s0.jpg", "s0.json", "s1.jpg", "s1.json", "s2.jpg", "s2.json"),
        *("two.0.jpg", "two.1.jpg", "two.json"),
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    data = {member.offset_data: member.size for member in members}
    for row in corpus.index(corpus.tars[0]).to_pylist():
        assert data[row["image_offset"]] == row["image_bytes"]
        assert data[row["text_offset"]] == row["text_bytes"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_webdataset_reads_what_is_packed(source, tmp_path):
    source.add("Grüße.aus/Köln", source.image("ä ö.png"))
    source.add("k" * 200, source.image("long.jpg"))
    source.add("text")
    source.add("two", "ä ö.png", "long.jpg")
    pack_llava_json(source.write(), [source.images], tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    samples = list(webdataset.WebDataset(str(corpus.tar_path(corpus.tars[0])), shardshuffle=False))
    rows = corpus.index(corpus.tars[0]).to_pylist()
    assert [s["__key__"] for s in samples] == list(dict.fromkeys(row["key"] for row in rows))
    assert [sorted(k for k in s if k[0] != "_") for s in samples] == [
        ["json", "png"],
        ["jpg", "json"],
        ["json"],
        ["0.png", "1.jpg", "json"],
    ]
    assert samples[0]["png"] == (source.images / "ä ö.png").read_bytes()
    assert json.loads(samples[0]["json"])["id"] == "Grüße.aus/Köln"


@given(st.text(max_size=120), st.text(max_size=120))
def test_keys_are_safe_and_stay_different(one, other):
    for name in (one, other):
        key = safe_key(name)
        assert key == safe_key(name)
        assert 0 < len(key) <= 60
        assert not set(key) & set("./\\ \n\0")
    assert (safe_key(one) == safe_key(other)) == (one == other)


def test_a_plain_id_is_the_key():
    assert safe_key("GCC_train-000123") == "GCC_train-000123"


def test_what_cannot_be_used_is_left_out_with_file_and_reason(source, tmp_path):
    source.add_many(range(2))
    (source.images / "empty.jpg").touch()
    (source.images / "cut.jpg").write_bytes((source.images / "0.jpg").read_bytes()[:300])
    (source.images / "folder.jpg").mkdir()
    for name in ("empty", "cut", "folder", "missing"):
        source.add(f"{name}.id", f"{name}.jpg")
    source.add("number", image=3)
    source.samples += [
        "not an object",
        {"id": "mute", "image": "0.jpg"},
        {
            "id": "blind",
            "image": "0.jpg",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
        },
    ]
    report = pack_llava_json(source.write(), [source.images], tmp_path / "out")
    assert report.samples == 2
    reasons = {issue.key: (issue.file, issue.reason) for issue in report.left_out}
    for key, file, reason in [
        ("empty.id", "empty.jpg", "empty file (0 bytes)"),
        ("cut.id", "cut.jpg", "cannot be decoded"),
        ("folder.id", "folder.jpg", "cannot be read (Is a directory)"),
        ("missing.id", "missing.jpg", "not found in"),
        ("number", str(source.json), "image: expected a path"),
        ("000000007", str(source.json), "expected an object"),
        ("mute", str(source.json), "no list of conversations"),
        ("blind", str(source.json), "1 images, but 0 times <image>"),
    ]:
        assert reasons[key][0] == file
        assert reason in reasons[key][1]
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in listed} == set(reasons)
    assert len(listed) == 8


def test_a_repeated_id_is_packed_under_its_hash_and_a_repeated_sample_left_out(source, tmp_path, keys):
    source.add_many(range(2))
    source.add("s0", "1.jpg")
    source.add("s0", "0.jpg")
    report = pack_llava_json(source.write(), [source.images], tmp_path / "out")
    found = keys(Corpus.open(tmp_path / "out"))
    assert found[:2] == ["s0", "s1"]
    assert found[2].startswith("s0-")
    assert [(i.key, i.file) for i in report.renamed] == [("s0", "1.jpg")]
    assert [(i.key, i.reason) for i in report.left_out] == [("s0", "duplicate of a sample in the same source")]


def test_growing_appends_and_keeps_the_id(source, tmp_path, contents, keys):
    source.add_many(range(5))
    out = tmp_path / "out"
    pack_llava_json(source.write(), [source.images], out, 2)
    before, id_before = contents(out), Corpus.open(out).id
    source.add_many(range(5, 8))
    report = pack_llava_json(source.write(), [source.images], out, 2)
    assert (report.already, report.samples, report.tars) == (5, 3, 2)
    corpus = Corpus.open(out)
    assert corpus.id == id_before
    assert keys(corpus) == [f"s{i}" for i in range(8)]
    after = contents(out)
    assert {name: after[name] for name in before if name != "tars.parquet"} == {
        name: data for name, data in before.items() if name != "tars.parquet"
    }


def test_packing_again_changes_nothing(source, tmp_path, contents):
    source.add_many(range(5))
    source.add("s0", "1.jpg")
    source.add("gone", "gone.jpg")
    out = tmp_path / "out"
    pack_llava_json(source.write(), [source.images], out, 2)
    before = contents(out)
    report = pack_llava_json(source.json, [source.images], out, 2)
    assert (report.already, report.samples, report.tars) == (6, 0, 0)
    assert contents(out) == before


def test_an_image_that_was_missing_is_packed_the_next_time(source, tmp_path, keys):
    source.add_many(range(2))
    source.add("late", "late.jpg")
    out = tmp_path / "out"
    assert len(pack_llava_json(source.write(), [source.images], out).left_out) == 1
    source.image("late.jpg")
    assert not pack_llava_json(source.json, [source.images], out).left_out
    assert keys(Corpus.open(out)) == ["s0", "s1", "late"]
    assert (out / "left_out.jsonl").read_text() == ""


def test_other_formats_are_stored_as_png(source, tmp_path):
    source.add("gif", source.image("a.gif"))
    source.add("lies", source.image("really.png"))
    (source.images / "really.png").rename(source.images / "lies.jpg")
    source.samples[1]["image"] = "lies.jpg"
    pack_llava_json(source.write(), [source.images], tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    with tarfile.open(corpus.tar_path(corpus.tars[0])) as tar:
        assert [name for name in tar.getnames() if "json" not in name] == ["gif.png", "lies.png"]


def test_image_roots_are_searched_in_order(source, tmp_path):
    source.add_many(range(2))
    first = tmp_path / "first"
    first.mkdir()
    (source.images / "1.jpg").rename(first / "1.jpg")
    assert pack_llava_json(source.write(), [first, source.images], tmp_path / "out").samples == 2


def test_json_lines_give_the_same_corpus(source, tmp_path):
    source.add_many(range(3))
    lines = source.folder / "samples.jsonl"
    lines.write_text("\n".join(json.dumps(sample) for sample in source.samples) + "\n")
    pack_llava_json(source.write(), [source.images], tmp_path / "json")
    pack_llava_json(lines, [source.images], tmp_path / "jsonl")
    assert Corpus.open(tmp_path / "json").id == Corpus.open(tmp_path / "jsonl").id


def test_a_broken_line_is_left_out_by_its_number(source, tmp_path):
    source.add_many(range(2))
    good = [json.dumps(sample) for sample in source.samples]
    lines = source.folder / "samples.jsonl"
    deep = "[" * 100_000
    lines.write_text("\n".join(["\ufeff" + good[0], '{"id": "cut', "", deep, good[1]]))
    report = pack_llava_json(lines, [source.images], tmp_path / "out")
    assert report.samples == 2
    assert [issue.key for issue in report.left_out] == ["line 2", "line 4"]
    assert report.left_out[0].reason.startswith("line 2 is not JSON: ")


def test_a_list_that_ends_early_is_refused_before_anything_is_written(source, tmp_path):
    source.add_many(range(3))
    source.json.write_text(json.dumps(source.samples)[:-40])
    with pytest.raises(OlaError, match=r"samples\.json: not JSON \(after 2 samples: .*premature EOF"):
        pack_llava_json(source.json, [source.images], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_json_is_not_held_in_memory(tmp_path):
    text = "words " * 1000
    for name, form in (("list.json", "[{}]"), ("lines.jsonl", "{}")):
        rows = [json.dumps({"id": i, "conversations": talk("Go on.", f"{i} {text}")}) for i in range(1500)]
        (tmp_path / name).write_text(form.format((",\n" if name == "list.json" else "\n").join(rows)))
        del rows
        tracemalloc.start()
        pack_llava_json(tmp_path / name, [tmp_path], tmp_path / f"{name}.out", samples_per_tar=500)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < (tmp_path / name).stat().st_size / 3, "9 MB of JSON"


def test_captions_beside_images(source, tmp_path):
    folder = source.images
    for name, caption in [("a.jpg", "An Ä.\n"), ("deep/b.png", "B."), ("mute.jpg", " "), ("bad.jpg", None)]:
        source.image(name)
        (folder / name).with_suffix(".txt").write_bytes(b"\xff" if caption is None else caption.encode())
    source.image("alone.jpg")
    (folder / "nothing.txt").write_text("No image.")
    report = pack_caption_folder(folder, tmp_path / "out")
    assert {(issue.file, issue.reason) for issue in report.left_out} == {
        ("alone.jpg", "no caption beside it"),
        ("bad.jpg", "its caption is not UTF-8"),
        ("mute.jpg", "its caption is empty"),
        ("nothing.txt", "caption without an image"),
    }
    corpus = Corpus.open(tmp_path / "out")
    rows = corpus.index(corpus.tars[0]).to_pylist()
    texts = [corpus.read(corpus.tars[0], row["text_offset"], row["text_bytes"]) for row in rows]
    assert rows[0]["key"] == "a"
    assert [conversation("json", text)[1]["value"] for text in texts] == ["An Ä.", "B."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}, {', r"not JSON \(after 1 samples: "),
        ('{"a": 1}', "expected a list of samples"),
        ("[]", "nothing to make a corpus of"),
    ],
)
def test_a_file_without_samples_is_refused_and_leaves_no_corpus(source, tmp_path, content, message):
    source.json.write_text(content)
    with pytest.raises(OlaError, match=message):
        pack_llava_json(source.json, [source.images], tmp_path / "out")
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_all_images_missing_names_the_first(source, tmp_path):
    source.add("s", "gone.jpg")
    with pytest.raises(OlaError, match=r"1 left out, such as gone\.jpg: not found in"):
        pack_llava_json(source.write(), [source.images], tmp_path / "out")


def test_what_is_not_there_is_named(source, tmp_path):
    for pack in (
        lambda: pack_llava_json(tmp_path / "no.json", [source.images], tmp_path / "out"),
        lambda: pack_llava_json(source.json, [tmp_path / "no.images"], tmp_path / "out"),
        lambda: pack_caption_folder(tmp_path / "no.folder", tmp_path / "out"),
    ):
        with pytest.raises(OlaError, match=r"no\.(json|images|folder)"):
            pack()


def test_a_file_in_the_way_is_never_overwritten(source, tmp_path):
    source.add_many(range(1))
    stranger = tmp_path / "out" / "tars" / "000000.tar"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"somebody's")
    with pytest.raises(OlaError, match=r"000000\.tar: this file is in the way"):
        pack_llava_json(source.write(), [source.images], tmp_path / "out")
    assert stranger.read_bytes() == b"somebody's"


def test_in_order_never_runs_far_ahead():
    taken = []

    def items():
        for i in range(40):
            taken.append(i)
            yield i

    with closing(in_order(int, items(), workers=2, together=3)) as results:
        for result in results:
            assert len(taken) <= result + 12
    assert taken == list(range(40))


def test_a_killed_worker_is_one_line():
    with pytest.raises(OlaError, match="a worker process was killed"):
        list(in_order(os._exit, [1, 1], workers=2))


def test_what_a_worker_raises_arrives_and_ends_the_others():
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_order(int, ["1", "one", *"2" * 50], workers=2))


def test_progress_ends_with_the_total(source, tmp_path):
    source.add_many(range(4))
    source.add("gone", "gone.jpg")
    calls = []
    pack_llava_json(source.write(), [source.images], tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[-1] == (5, 5, "samples")
    assert calls == sorted(calls)


def test_build_follows_the_pipeline_source(source, tmp_path):
    source.add_many(range(3))
    json_source = LlavaJsonSource(kind="llava_json", json_file=str(source.write()), image_roots=[str(source.images)])
    assert build(json_source, tmp_path / "json").samples == 3
    for i in range(3):
        (source.images / f"{i}.txt").write_text(f"Number {i}.")
    captions = CaptionFolderSource(kind="caption_folder", folder=str(source.images), samples_per_tar=2)
    assert build(captions, tmp_path / "captions").tars == 2
