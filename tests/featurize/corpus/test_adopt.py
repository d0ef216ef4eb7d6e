import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featurize.corpus import adopt, build, pack_llava_json
from olavlm.config import WebDatasetSource
from olavlm.data.corpus import Corpus, conversation
from olavlm.errors import OlaError


def picture(kind: str = "JPEG", colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def llava(images: int = 1) -> bytes:
    turns = [{"from": "human", "value": "<image>" * images + "?"}, {"from": "gpt", "value": "!"}]
    return json.dumps({"conversations": turns}).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def rows_of(out: Path) -> list[dict]:
    corpus = Corpus.open(out)
    return [row for tar in corpus.tars for row in corpus.index(tar).to_pylist()]


def img2dataset(folder: Path, shard: int, captions: list[str | None]) -> Path:
    """A shard as img2dataset 1.x writes it; a caption of None stands for a download that failed."""
    members = []
    for i, caption in enumerate(captions):
        key = f"{shard:05d}{i:04d}"
        about = {"caption": caption, "url": "http://…", "key": key, "status": "success", "error_message": None}
        about |= {"width": 12, "height": 8, "original_width": 12, "original_height": 8, "exif": "{}", "sha256": "0f"}
        if caption is not None:
            members += [(f"{key}.jpg", picture()), (f"{key}.json", json.dumps(about).encode())]
            members += [(f"{key}.txt", caption.encode())]
    (folder / f"{shard:05d}_stats.json").parent.mkdir(exist_ok=True)
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(captions), "failed_to_download": 1}))
    pq.write_table(
        pa.table({"key": [f"{shard:05d}{i:04d}" for i in range(len(captions))]}), folder / f"{shard:05d}.parquet"
    )
    return write_tar(folder / f"{shard:05d}.tar", members)


def test_img2dataset_output_is_read_as_captions(tmp_path, keys):
    for shard in range(2):
        img2dataset(tmp_path / "laion", shard, ["A dot.", None, "", "Ein „Käse“."])
    report = build(WebDatasetSource(kind="webdataset", tars=str(tmp_path / "laion" / "*.tar")), tmp_path / "out")
    assert (report.tars, report.samples, report.images) == (2, 4, 4)
    assert [(i.key, i.reason) for i in report.left_out] == [
        ("000000002", "empty caption"),
        ("000010002", "empty caption"),
    ]
    corpus = Corpus.open(tmp_path / "out")
    assert keys(corpus) == ["000000000", "000000003", "000010000", "000010003"]
    row = corpus.index(corpus.tars[1]).to_pylist()[1]
    assert (row["text_member"], row["width"], row["height"]) == ("txt", 12, 8)
    text = corpus.read(corpus.tars[1], row["text_offset"], row["text_bytes"])
    assert conversation("txt", text)[1]["value"] == "Ein „Käse“."


def test_what_lies_beside_a_tar_is_left_out_with_the_reason(tmp_path):
    tar = img2dataset(tmp_path / "laion", 0, ["A dot."])
    report = adopt(sorted(tar.parent.iterdir()), tmp_path / "out")
    assert [Path(i.file).name for i in report.left_out] == ["00000.parquet", "00000_stats.json"]
    assert all(i.reason.startswith("damaged tar, or not a plain one") for i in report.left_out)
    assert report.tars == 1


def test_a_broken_conversation_is_not_replaced_by_the_caption_beside_it(tmp_path):
    silent = json.dumps({"conversations": []}).encode()
    members = [
        *[("a.jpg", picture()), ("a.json", silent), ("a.txt", b"A dot.")],
        *[("b.jpg", picture()), ("b.json", llava()), ("b.txt", b"A dot.")],
    ]
    report = adopt([write_tar(tmp_path / "t.tar", members)], tmp_path / "out")
    assert [(i.key, i.reason) for i in report.left_out] == [("a", "no answer of gpt in the conversation")]
    assert [row["text_member"] for row in rows_of(tmp_path / "out")] == ["json"]


def test_workers_do_not_show(tmp_path, contents):
    tars = [img2dataset(tmp_path / "laion", shard, ["A.", None, "", str(shard)]) for shard in range(5)]
    tars[3].write_bytes(tars[3].read_bytes()[:700])
    for workers in (1, 2):
        adopt(tars, tmp_path / f"{workers}", workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_a_damaged_tar_never_stops_the_others(tmp_path_factory, data, form):
    folder = tmp_path_factory.mktemp("damaged")
    members = [("ü" * 90 + ".json", llava(0)), ("k" * 150 + ".json", llava(0))]
    good = bytearray(write_tar(folder / "good.tar", members, form).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    (folder / "bad.tar").write_bytes(good[: data.draw(st.integers(0, len(good)))])
    report = adopt([folder / "bad.tar", folder / "good.tar"], folder / "out")
    adopted = Corpus.open(folder / "out").tars
    assert "good" in [tar.name for tar in adopted] or "the same content" in report.left_out[0].reason
    assert len(adopted) == 2 or report.left_out


def test_adopting_writes_only_the_index(tmp_path, contents):
    tar = write_tar(tmp_path / "data" / "00000.tar", [("a.jpg", picture()), ("a.json", llava())])
    before = tar.read_bytes(), os.stat(tar).st_mtime_ns
    adopt([tar], tmp_path / "out")
    assert (tar.read_bytes(), os.stat(tar).st_mtime_ns) == before
    assert sorted(contents(tmp_path / "out")) == [
        "corpus.json",
        "index/00000.parquet",
        "left_out.jsonl",
        "renamed.jsonl",
        "tars.parquet",
    ]


def test_an_adopted_pack_has_the_index_the_pack_has(source, tmp_path):
    source.add_many(range(5))
    source.add("two", "0.jpg", "1.jpg")
    source.add("text")
    pack_llava_json(source.write(), [source.images], tmp_path / "packed", 3)
    packed = Corpus.open(tmp_path / "packed")
    adopt([packed.tar_path(tar) for tar in packed.tars], tmp_path / "adopted")
    adopted = Corpus.open(tmp_path / "adopted")
    assert adopted.id == packed.id
    for one, other in zip(packed.tars, adopted.tars, strict=True):
        assert packed.index(one).equals(adopted.index(other))


def test_folders_several_images_and_foreign_members(tmp_path):
    members = [
        ("x/a.1.PNG", picture("PNG", "blue")),
        ("x/a.0.jpeg", picture()),
        ("x/a.json", llava(2)),
        ("x/a.cls", b"3"),
        ("x/a.mask.png", picture("PNG")),
        ("README", b"no sample"),
        ("x/t.json", llava(0)),
    ]
    tar = write_tar(tmp_path / "t.tar", members)
    report = adopt([tar], tmp_path / "out")
    assert report.left_out == []
    rows = rows_of(tmp_path / "out")
    assert [(row["key"], row["image_index"]) for row in rows] == [("x/a", 0), ("x/a", 1), ("x/t", -1)]
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.read(corpus.tars[0], rows[0]["image_offset"], rows[0]["image_bytes"]) == picture()


def test_bad_images_stay_in_the_index_and_bad_samples_are_left_out(tmp_path):
    members = [
        *[("good.jpg", picture()), ("good.json", llava())],
        *[("empty.jpg", b""), ("empty.json", llava())],
        *[("mute.jpg", picture())],
        *[("blind.txt", b"A caption.")],
        *[("broken.jpg", picture()), ("broken.json", b"{")],
        *[("good.jpg", picture(colour="green")), ("good.json", llava())],
        *[("twice.json", llava(0)), ("twice.json", llava(0))],
        *[("caf\udce9.json", llava(0))],
    ]
    report = adopt([write_tar(tmp_path / "t.tar", members)], tmp_path / "out")
    reasons = {(issue.key, issue.file): issue.reason for issue in report.left_out}
    assert reasons == {
        ("empty", "empty.jpg"): "empty file (0 bytes)",
        ("mute", "mute.*"): "no json or txt member",
        ("blind", "blind.*"): "0 images, but 1 times <image> in the conversation",
        ("broken", "broken.*"): reasons["broken", "broken.*"],
        ("good", "good.*"): "duplicate key in this tar",
        ("twice", "twice.*"): "two members twice.json",
        ("caf\udce9", "caf\udce9.*"): "the member's name is not UTF-8",
    }
    assert "not JSON" in reasons["broken", "broken.*"]
    rows = rows_of(tmp_path / "out")
    assert [(row["key"], row["error"], row["width"]) for row in rows] == [
        ("good", None, 12),
        ("empty", "empty file (0 bytes)", 0),
    ]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.9])
def test_a_tar_cut_anywhere_is_left_out_whole(tmp_path, part):
    members = [m for i in range(20) for m in ((f"{i}.jpg", picture()), (f"{i}.json", llava()))]
    whole = write_tar(tmp_path / "whole.tar", members)
    with tarfile.open(whole) as tar:
        end = tar.getmembers()[-1].offset
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: int(end * part)])
    report = adopt([cut, whole], tmp_path / "out")
    (issue,) = report.left_out
    assert issue.file == str(cut)
    assert issue.reason.startswith("damaged tar")
    assert [tar.name for tar in Corpus.open(tmp_path / "out").tars] == ["whole"]


def test_a_tar_cut_between_two_members_is_left_out_whole(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [("0.json", llava(0)), ("1.json", llava(0))])
    with tarfile.open(whole) as tar:
        second = tar.getmembers()[1].offset
    cut = tmp_path / "cut.tar"
    for damaged in (whole.read_bytes()[:second], whole.read_bytes()[:second] + b"\x01" * 2048):
        cut.write_bytes(damaged)
        with pytest.raises(OlaError, match=r"cut\.tar: damaged tar"):
            adopt([cut], tmp_path / "out")


def test_two_tars_joined_in_one_file_are_left_out_whole(tmp_path):
    one, two = (write_tar(tmp_path / f"{i}.tar", [(f"{i}.json", llava(0))]) for i in range(2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    report = adopt([joined, one], tmp_path / "out")
    assert [(i.file, "tars joined" in i.reason) for i in report.left_out] == [(str(joined), True)]


def test_a_compressed_tar_is_left_out_with_the_reason(tmp_path):
    plain = write_tar(tmp_path / "plain.tar", [("t.json", llava(0))])
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(plain)
    report = adopt([plain, packed], tmp_path / "out")
    assert [issue.file for issue in report.left_out] == [str(packed)]


def test_adopting_more_appends_and_skips_what_is_there(tmp_path, contents):
    one, two, copy = (tmp_path / name for name in ("a/0.tar", "b/0.tar", "copy.tar"))
    write_tar(one, [("a.jpg", picture()), ("a.json", llava())])
    write_tar(two, [("b.jpg", picture(colour="blue")), ("b.json", llava())])
    out = tmp_path / "out"
    adopt([one], out)
    before = Corpus.open(out)
    copy.write_bytes(one.read_bytes())
    report = adopt([one, two, copy], out)
    assert (report.tars, report.already) == (1, 1)
    assert [(issue.file, issue.reason) for issue in report.left_out] == [
        (str(copy), f"the same content as tar 0 ({one})"),
    ]
    after = Corpus.open(out)
    assert after.id == before.id
    assert [tar.name for tar in after.tars] == ["0", "b-0"]
    unchanged = contents(out)
    adopt([one, two, copy], out)
    assert contents(out) == unchanged


def test_a_tar_that_changed_since_is_refused(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("t.json", llava(0))])
    adopt([tar], tmp_path / "out")
    write_tar(tar, [("u.json", llava(0))])
    with pytest.raises(OlaError, match=r"t\.tar: changed since it was adopted"):
        adopt([tar], tmp_path / "out")


def test_a_tar_that_was_only_touched_is_still_known(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("t.json", llava(0))])
    adopt([tar], tmp_path / "out")
    os.utime(tar, (4e9, 4e9))
    assert adopt([tar, tar], tmp_path / "out").already == 1


def test_a_tar_whose_path_is_no_unicode_is_refused_by_name(tmp_path):
    tar = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.tar"))
    try:
        write_tar(tar, [("t.json", llava(0))])
    except OSError:
        pytest.skip("this file system takes only Unicode")
    with pytest.raises(OlaError, match=r"its path is not UTF-8"):
        adopt([tar], tmp_path / "out")


def test_a_relative_path_stays_relative_so_that_both_can_move(tmp_path, monkeypatch):
    home = tmp_path / "home"
    write_tar(home / "tars" / "t.tar", [("t.json", llava(0))])
    monkeypatch.chdir(home)
    adopt([Path("tars/t.tar")], Path("corpora/one"))
    assert Corpus.open("corpora/one").tars[0].path == "../../tars/t.tar"
    home.rename(tmp_path / "elsewhere")
    corpus = Corpus.open(tmp_path / "elsewhere" / "corpora" / "one")
    corpus.verify_tar(corpus.tars[0])


def test_a_corpus_around_its_own_tars_keeps_them(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "tars" / "000000.tar", [("t.json", llava(0))])
    monkeypatch.chdir(tmp_path)

    class Crash(Exception):
        pass

    def crash(*_):
        raise Crash

    with pytest.raises(Crash):
        adopt([Path("tars/000000.tar")], Path("."), progress=crash)
    adopt([tar], tmp_path)  # another job, which drops the first one's pending list but not the tar
    assert Corpus.open(tmp_path).tars[0].samples == 1


def test_missing_tars_and_an_empty_glob_are_named(tmp_path):
    with pytest.raises(OlaError, match=r"no\.tar: there is no such file"):
        adopt([tmp_path / "no.tar"], tmp_path / "out")
    with pytest.raises(OlaError, match=r"no file matches .*\*\.tar"):
        build(WebDatasetSource(kind="webdataset", tars=str(tmp_path / "*.tar")), tmp_path / "out")


def test_build_adopts_a_glob_in_order(tmp_path):
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.json", llava(0))])
    build(WebDatasetSource(kind="webdataset", tars=str(tmp_path / "*.tar")), tmp_path / "out")
    assert [tar.name for tar in Corpus.open(tmp_path / "out").tars] == ["a", "b"]
