"""Stored features of a benchmark's images: found by the image's bytes, refused where one is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olavlm.data import codec
from olavlm.data.commit import TarWriter, describe_arrays
from olavlm.data.corpus import Corpus, Tar, content_hash
from olavlm.data.targets import Identity, TargetSet, TargetStore
from olavlm.errors import OlaError
from olavlm.eval.features import ImageFeatures

IMAGES = [b"first", b"second", b"third"]
TAR = Tar("000000", "tars/000000.tar", "0" * 32, 0, 3, 3)


@pytest.fixture(params=["int8", "int4", "fp16"])
def target(request: Any, tmp_path: Path) -> TargetSet:
    """Features of three images, the last of which has none."""
    identity = Identity(
        "depth", "some", "w", None, "0", "float32", "squash", 8, "none", "none", None, "none", 2, 32, request.param
    )
    target = TargetStore.create(tmp_path, "c").add(identity, block=2)
    describe_arrays(target, rows=4)
    writer = TarWriter.open(target, TAR, range(2))
    assert writer is not None
    with writer:
        for i, data in enumerate(IMAGES):
            key, stored = content_hash(data), "f" * 32  # a format that packing changes: the stored bytes are others
            if i == 2:
                writer.fail(key, 0, stored, "no features today")
            else:
                values, scales = codec.encode(FEATURES[i : i + 1], request.param)
                writer.add(key, 0, stored, values[0], None if scales is None else scales[0], 1.0, 1.0)
        writer.commit()
    return target


FEATURES = np.random.default_rng(0).normal(size=(3, 4, 32)).astype(np.float32)


def test_features_come_in_the_order_of_the_images(target: TargetSet) -> None:
    found = ImageFeatures(Corpus(Path("nowhere"), "c", [TAR]), {"depth": target})
    found.check({"2D/1": IMAGES[0], "2D/2": IMAGES[1], "2D/3": IMAGES[0]})
    read = found.read([IMAGES[1], IMAGES[0], IMAGES[1]], torch.device("cpu"))["depth"]
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, torch.from_numpy(FEATURES[[1, 0, 1]]), atol=0.25, rtol=0)
    assert torch.equal(read[0], read[2])


def test_promise_8_nothing_lost_in_silence_an_image_without_features_is_named(target: TargetSet) -> None:
    found = ImageFeatures(Corpus(Path("nowhere"), "c", [TAR]), {"depth": target})
    with pytest.raises(OlaError, match=r"1 of 2 images have no depth features.*2D/3: no features today"):
        found.check({"2D/1": IMAGES[0], "2D/3": IMAGES[2]})
    with pytest.raises(OlaError, match=r"2D/9: not in the corpus"):
        found.check({"2D/9": b"another"})
    target.commit_file(TAR).unlink()
    with pytest.raises(OlaError, match=r"000000\.parquet: tar 000000 is not featurized"):
        ImageFeatures(Corpus(Path("nowhere"), "c", [TAR]), {"depth": target})
