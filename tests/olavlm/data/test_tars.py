"""The WebDataset form: what the webdataset library reads is what was packed, and the offsets point at it."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from olavlm.data import codec
from olavlm.data.commit import TarWriter, describe_arrays
from olavlm.data.targets import TargetSet, TargetStore
from olavlm.data.tars import member_stems, npy_header, pack
from olavlm.errors import OlaError

from .test_targets import BLOCK, BLOCKS, IDENTITY, Tar

names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1, max_size=120)


@given(st.dictionaries(names, st.binary(max_size=700), max_size=5))
def test_offsets_point_at_the_contents_and_tar_reads_the_members(members: dict[str, bytes]) -> None:
    data, offsets = pack([(name, b"head", content) for name, content in members.items()])
    assert [data[o : o + len(c)] for o, c in zip(offsets, members.values(), strict=True)] == list(members.values())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == {n: b"head" + c for n, c in members.items()}
    assert data == pack([(name, b"head", content) for name, content in members.items()])[0]


@given(st.sampled_from(["int8", "uint8", "<f2", "<f4"]), st.lists(st.integers(1, 5), max_size=3))
def test_a_header_and_the_bytes_are_an_npy_file(dtype: str, shape: list[int]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    found = np.load(io.BytesIO(npy_header(array.dtype, array.shape) + array.tobytes()))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_several_images_of_a_sample_are_numbered() -> None:
    rows = [("a", 0), ("b", 0), ("b", 1), ("c", -1), ("d", 0)]
    listed = [{"key": key, "image_index": index} for key, index in rows]
    assert member_stems(listed, None) == ["a", "b.0", "b.1", "c", "d"]
    assert member_stems(listed, "d")[-1] == "d.0"  # its other images are in the next tar
    assert member_stems(listed[2:], None)[0] == "b.1"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["int8", "fp16"])
def test_both_forms_and_every_way_to_read_them_agree(tmp_path: Path, name: str) -> None:
    features = np.random.default_rng(0).normal(size=(7, 4, 6)).astype(np.float32)
    values, scales = codec.encode(features, name)
    # c has two images, the second of them in the next block; e failed; t is text
    rows = [("a", 0), ("t", -1), ("b", 0), ("e", 0), ("c", 0), ("c", 1), ("dé", 0)]
    sets = {}
    for form in ("zarr", "webdataset"):
        target = TargetStore.create(tmp_path / form, "corpus").add(replace(IDENTITY, codec=name), BLOCK, form)
        describe_arrays(target, 2 * BLOCK)
        with TarWriter.open(target, Tar(), BLOCKS) as writer:
            for i, (key, index) in enumerate(rows):
                if key == "t":
                    writer.no_image(key)
                elif key == "e":
                    writer.fail(key, index, "hash", "broken")
                else:
                    writer.add(key, index, "hash", values[i], None if scales is None else scales[i], 1.0, 2.0)
            writer.commit()
        sets[form] = TargetSet(target.path)
    assert {path.name for path in sets["webdataset"].path.iterdir()} == {"target.json", "tars", "commits", "leases"}
    commits = {form: target.commit(Tar()) for form, target in sets.items()}
    ours = ["values_offset", "scales_offset"]
    assert commits["zarr"].drop(ours).equals(commits["webdataset"].drop(ours))
    for i, row in enumerate(commits["webdataset"].to_pylist()):
        if row["status"] == "ok":
            for form, target in sets.items():
                got, got_scales = target.read(commits[form].to_pylist()[i], row["key"])
                np.testing.assert_array_equal(got, values[i])
                assert (got_scales is None) == (scales is None)
                if scales is not None:
                    np.testing.assert_array_equal(got_scales, scales[i])
    found = _by_webdataset(sets["webdataset"])
    fields = {(0, "npy"): "a", (2, "npy"): "b", (4, "0.npy"): "c", (5, "1.npy"): "c", (6, "npy"): "dé"}
    for (i, field), key in fields.items():
        np.testing.assert_array_equal(found.pop((key, field)), values[i])
        if scales is not None:
            np.testing.assert_array_equal(found.pop((key, field.replace("npy", "scales.npy"))), scales[i])
    assert found == {}


def test_the_two_forms_are_never_mixed_in_one_set(tmp_path: Path) -> None:
    store = TargetStore.create(tmp_path, "corpus")
    store.add(IDENTITY, BLOCK)
    with pytest.raises(OlaError, match=r"made with featurize\.format=zarr, not webdataset"):
        store.add(IDENTITY, BLOCK, "webdataset")


def test_a_set_made_before_there_were_two_forms_is_zarr(tmp_path: Path) -> None:
    target = TargetStore.create(tmp_path, "corpus").add(IDENTITY, BLOCK)
    file = target.path / "target.json"
    file.write_text(file.read_text().replace('"format": "zarr"', '"other": 0'))
    assert TargetSet(target.path).format == "zarr"


def _by_webdataset(target: TargetSet) -> dict[tuple[str, str], Any]:
    """Every array the webdataset library finds, by key and field. (It leaves closing its files to Python.)"""
    found = {}
    for file in sorted((target.path / "tars").iterdir()):
        for sample in webdataset.WebDataset(str(file), shardshuffle=False, empty_check=False).decode():
            found |= {(sample["__key__"], k): v for k, v in sample.items() if not k.startswith("__")}
    return found
