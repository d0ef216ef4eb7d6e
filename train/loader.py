"""Reads micro-batches ahead of the training, in threads.

Reading, decoding and resizing release the GIL, so threads are enough, and nothing is copied between processes. One
thread makes one micro-batch from start to end: there is no shared state, and the result does not depend on how many
threads there are. What a sample is made of was pinned; here it is checked once more, byte for byte (promise 1).

A micro-batch is allocated once and written in place: targets go from the file straight into their row. For a GPU it is
pinned memory; PyTorch keeps the pinned blocks of batches that are gone and hands them out again, each only after the
copies that read it are done, so that nothing is pinned anew and no ring of buffers needs guarding here. From an object
store a micro-batch asks for many ranges at a time; `olavlm.data.cache` may keep them.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from olavlm.config import Codec
from olavlm.data import codec
from olavlm.data.corpus import IMAGE_PLACEHOLDER, content_hash, conversation
from olavlm.data.images import decode_image
from olavlm.data.objects import ObjectPath
from olavlm.data.targets import TargetSet
from olavlm.errors import OlaError
from olavlm.model import OlaVlmProcessor
from olavlm.model.processing import Encoded
from train.order import Ints
from train.snapshot import Image, Sample, Snapshot

Array = np.ndarray[Any, Any]

IGNORED = -100
_REQUESTS = 32  # to an object store at the same time


@dataclass
class Targets:
    """One task's targets for the n images of a micro-batch, as stored; `features` decodes them where they are."""

    values: Tensor  # (n, …) as the codec's layout says; a provider of its own may give float32 as codec fp16
    scales: Tensor | None  # (n, …), codecs with scales
    valid: Tensor  # (n,) bool; False: the image has no target, its row is zero
    codec: Codec

    def each(self, apply: Callable[[Tensor], Tensor]) -> "Targets":
        """The same targets with `apply` done to every tensor."""
        scales = None if self.scales is None else apply(self.scales)
        return Targets(apply(self.values), scales, apply(self.valid), self.codec)

    def features(self) -> Tensor:
        """(n, tokens, width) float32."""
        return codec.decode(self.values, self.scales, self.codec)


@dataclass
class MicroBatch:
    """What one forward pass gets: b samples with n images between them, in the samples' order."""

    input_ids: Tensor  # (b, length) int64, padded on the right
    attention_mask: Tensor  # (b, length) int64
    labels: Tensor  # (b, length) int64, -100 where nothing is learned
    pixel_values: Tensor  # (n, 3, size, size) float32
    targets: dict[str, Targets]  # to be learned, and to be fed to a student with encoders
    keys: list[str]  # data, tar and key of every sample, for messages
    answers_cut: list[int] = field(default_factory=list)  # answers that every sample lost at max_length

    def each(self, apply: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same batch with `apply` done to every tensor, e.g. a move to a device."""
        return MicroBatch(
            apply(self.input_ids),
            apply(self.attention_mask),
            apply(self.labels),
            apply(self.pixel_values),
            {task: targets.each(apply) for task, targets in self.targets.items()},
            self.keys,
            self.answers_cut,
        )


class Loader:
    """Iterates over steps; each is the list of this rank's micro-batches, read ahead by a bounded number of steps.

    Attributes:
        steps: the steps it yields.
        waited: seconds the caller has waited for data so far.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        processor: OlaVlmProcessor,
        tasks: list[str],
        max_length: int,
        steps: range,
        share: Callable[[int], list[Ints]],
        threads: int,
        pin_memory: bool = False,
    ):
        """Set up; reading starts with the iteration.

        Args:
            snapshot: the pinned data.
            processor: the student's; its `view` is what the student sees.
            tasks: tasks whose targets are read.
            max_length: tokens per sample at most.
            steps: which steps to yield.
            share: the samples of a step, as this rank's micro-batches.
            threads: micro-batches made at the same time.
            pin_memory: for faster copies to a GPU.

        Raises:
            OlaError: `max_length` has no room for any of the data's images.
        """
        block = len(processor.image_block)
        if max_length < block and any(tar.images for corpus in snapshot.corpora.values() for tar in corpus.tars):
            raise OlaError(f"max_length: {max_length}; an image with its task tokens takes {block} tokens")
        self._snapshot, self._processor, self._tasks = snapshot, processor, tasks
        self._max_length, self._share, self.steps = max_length, share, steps
        self._threads, self._pin = threads, pin_memory
        files = [corpus.tar_path(tar) for corpus in snapshot.corpora.values() for tar in corpus.tars]
        files += [target.path for of_task in snapshot.targets.values() for target in of_task.values()]
        remote = any(isinstance(file, ObjectPath) for file in files)
        self._map = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="requests").map if remote else map
        self._tokenizer_lock = threading.Lock()  # a fast tokenizer must not be used by two threads at once
        self.waited = 0.0

    def __iter__(self) -> Generator[list[MicroBatch]]:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        ahead: deque[list[Future[MicroBatch]]] = deque()
        try:
            for step in self.steps:
                ahead.append([pool.submit(self.read, chunk) for chunk in self._share(step)])
                if len(ahead) > math.ceil(self._threads / max(len(ahead[-1]), 1)):
                    yield self._wait(ahead.popleft())
            while ahead:
                yield self._wait(ahead.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, futures: list[Future[MicroBatch]]) -> list[MicroBatch]:
        start = time.perf_counter()
        batches = [future.result() for future in futures]
        self.waited += time.perf_counter() - start
        return batches

    def read(self, numbers: Ints) -> MicroBatch:
        """Read the samples with these numbers into one micro-batch.

        Raises:
            OlaError: bytes or target of a sample are not the pinned ones, or its text and images do not fit together.
        """
        samples = [self._snapshot.sample(int(number)) for number in numbers]
        texts = list(self._map(self._encode, samples))
        kept = [self._processor.images_in(text.input_ids) for text in texts]  # images of turns cut off are not read
        used = [(sample, image) for sample, n in zip(samples, kept, strict=True) for image in sample.images[:n]]
        pictures = list(self._map(self._picture, used))
        size = self._processor.image_size
        pixel_values = self._empty((len(used), 3, size, size), torch.float32)
        return MicroBatch(
            input_ids=self._pad([text.input_ids for text in texts], self._processor.tokenizer.pad_token_id),
            attention_mask=self._pad([torch.ones_like(text.input_ids) for text in texts], 0),
            labels=self._pad([text.labels for text in texts], IGNORED),
            pixel_values=self._processor.pixel_values(pictures, pixel_values),
            targets={task: self.read_targets(task, used) for task in self._tasks},
            keys=[str(sample) for sample in samples],
            answers_cut=[text.answers_cut for text in texts],
        )

    def _encode(self, sample: Sample) -> Encoded:
        """The sample's conversation in tokens, cut at max_length."""
        corpus = self._snapshot.corpora[sample.data]
        text = corpus.read(sample.tar, sample.text_offset, sample.text_bytes)
        try:
            turns = conversation(sample.text_member, text)
            mentioned = sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in turns)
            if mentioned != len(sample.images):
                raise OlaError(f"its text has {mentioned} {IMAGE_PLACEHOLDER}, it has {len(sample.images)} images")
            with self._tokenizer_lock:
                return self._processor.encode_conversation(turns, self._max_length)
        except ValueError as error:
            raise OlaError(f"{sample}: {error}") from None

    def _picture(self, used: tuple[Sample, Image]) -> PILImage:
        sample, image = used
        data = self._snapshot.corpora[sample.data].read(sample.tar, image.offset, image.bytes, image.hash)
        found = content_hash(data)
        if found != image.hash:
            raise OlaError(
                f"{sample}, image {image.index}: its bytes changed since the run was pinned (hash {image.hash} then, "
                f"{found} now); restore the tar, or rebuild corpus and targets"
            )
        try:
            return decode_image(data)
        except ValueError as error:
            raise OlaError(f"{sample}, image {image.index}: {error}, though it was decodable when indexed") from None

    def read_targets(self, task: str, used: list[tuple[Sample, Image]]) -> Targets:
        """One task's target of every image in `used`, read straight into the batch's arrays. Raises as `read`."""
        sets = {name: of_task[task] for name, of_task in self._snapshot.targets.items()}
        identity = next(iter(sets.values())).identity
        layout = identity.layout
        values = self._empty((len(used), *layout.shape), _torch(layout.dtype))
        scales = None
        if layout.scales_dtype:
            scales = self._empty((len(used), *layout.scales_shape), _torch(layout.scales_dtype))
        valid = self._empty((len(used),), torch.bool)

        def fill(i: int) -> None:
            (sample, image), arrays = used[i], (values.numpy()[i], None if scales is None else scales.numpy()[i])
            row = image.targets.get(task)
            valid[i] = row is not None
            if row is not None:
                _read_target(sets[sample.data], row, sample, image, *arrays)
                return
            for array in arrays:
                if array is not None:
                    array.fill(0)

        list(self._map(fill, range(len(used))))
        return Targets(values, scales, valid, identity.codec)

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        """(b, longest) int64, filled up on the right."""
        out = self._empty((len(rows), max((len(row) for row in rows), default=0)), torch.int64).fill_(value)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin)


def _read_target(
    target: TargetSet, row: dict[str, Any], sample: Sample, image: Image, values: Array, scales: Array | None
) -> None:
    """One target, after a last look at whose it is (promise 1)."""
    if (row["image_hash"], row["image_index"]) != (image.hash, image.index):
        raise OlaError(
            f"{sample}, image {image.index} with hash {image.hash}: {target.path} offers the target of image "
            f"{row['image_index']} with hash {row['image_hash']}"
        )
    try:
        target.read_into(row, sample.key, values, scales)
    except OlaError as error:
        raise OlaError(f"{sample}, image {image.index}: {error}") from None


def _torch(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
