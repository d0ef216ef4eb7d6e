"""Stored features of a benchmark's images, for students that are fed them (`OlaVlmConfig.encoders`).

The images are a corpus like any other, featurized like any other; a sample's key is the hash of the image's bytes, so
that a question finds the features of the very image it is about (promise 1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olavlm.data import codec
from olavlm.data.corpus import Corpus, content_hash
from olavlm.data.targets import TargetSet
from olavlm.errors import OlaError


class ImageFeatures:
    """The features of images, found by their encoded bytes.

    Args:
        corpus: one image a sample, keyed by `content_hash` of its bytes.
        sets: encoder → its targets of that corpus.

    Raises:
        OlaError: a tar of the corpus is not featurized, or was when it had another content.
    """

    def __init__(self, corpus: Corpus, sets: Mapping[str, TargetSet]) -> None:
        self._sets = sets
        self._rows: dict[str, dict[str, dict[str, Any]]] = {encoder: {} for encoder in sets}
        for encoder, target in sets.items():
            for tar in corpus.tars:
                commit = target.commit(tar)
                if commit is None:
                    raise OlaError(f"{target.commit_file(tar)}: tar {tar.name} is not featurized; run featurize first")
                self._rows[encoder] |= {row["key"]: row for row in commit.to_pylist()}

    def check(self, images: Mapping[str, bytes]) -> None:
        """Raise if an image lacks a feature; nothing of a benchmark is left out (promise 8).

        Args:
            images: what an image is called in the message → its encoded bytes.
        """
        for encoder, rows in self._rows.items():
            lacking = {}
            for name, data in images.items():
                row = rows.get(content_hash(data))
                if row is None or row["status"] != "ok":
                    lacking[name] = row["reason"] if row else "not in the corpus"
            if lacking:
                examples = "; ".join(f"{name}: {reason}" for name, reason in [*lacking.items()][:3])
                raise OlaError(
                    f"{self._sets[encoder].path}: {len(lacking)} of {len(images)} images have no {encoder} features, "
                    f"which the student is fed ({examples})"
                )

    def read(self, images: Sequence[bytes], device: torch.device) -> dict[str, Tensor]:
        """Encoder → (n, tokens, width) float32 on `device`, for n images that `check` has passed."""
        return {encoder: self._read(encoder, images, device) for encoder in self._sets}

    def _read(self, encoder: str, images: Sequence[bytes], device: torch.device) -> Tensor:
        target = self._sets[encoder]
        keys = [content_hash(data) for data in images]
        values, scales = zip(*(target.read(self._rows[encoder][key], key) for key in keys), strict=True)
        stored = torch.from_numpy(np.stack(values)).to(device)
        of_tokens = None if scales[0] is None else torch.from_numpy(np.stack(scales)).to(device)
        return codec.decode(stored, of_tokens, target.identity.codec)
