"""The WebDataset form of a block of targets: a tar of ``.npy`` members, with every array's byte range known.

An image's members are ``{key}.npy`` and, for codecs with scales, ``{key}.scales.npy``; where a sample has several
images, ``{key}.{i}.npy`` and ``{key}.{i}.scales.npy`` for its i-th, like the images in a corpus. Any WebDataset loader
reads them; images without a target have no members. Members carry no owner and no time: same targets, same bytes.

Images whose targets came later, when failed ones were tried again, have their members at the end of their tar.
"""

import io
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_END = bytes(2 * tarfile.BLOCKSIZE)
_EXTENSIONS = {"values": "npy", "scales": "scales.npy"}


def member_stems(rows: Sequence[Mapping[str, Any]], following: str | None) -> list[str]:
    """What the names of each row's members begin with.

    Args:
        rows: of a commit (key, image_index), those of a sample together and in order.
        following: the key of the row after them.
    """
    keys = [*(row["key"] for row in rows), following]
    return [
        f"{row['key']}.{row['image_index']}" if row["image_index"] > 0 or row["key"] == after else row["key"]
        for row, after in zip(rows, keys[1:], strict=True)
    ]


def member_name(stem: str, array: str) -> str:
    """The name of an image's values or scales in a tar."""
    return f"{stem}.{_EXTENSIONS[array]}"


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What precedes an array's bytes in a ``.npy`` file."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def content_ranges(data: bytes) -> tuple[dict[str, tuple[int, int]], int]:
    """Offset and length of every member of a tar by name, and where more members would begin.

    Raises:
        ValueError: not a whole tar.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as file:
            found = {member.name: (member.offset_data, member.size) for member in file}
            return found, file.offset
    except tarfile.TarError as error:
        raise ValueError(f"not a whole tar ({error})") from None


def pack(members: Sequence[tuple[str, bytes, bytes]]) -> tuple[bytes, list[int]]:
    """A tar of members (name, header, content), and the offset of every content in it."""
    parts, offsets, position = [], [], 0
    for name, header, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(header) + len(content)
        head = info.tobuf(tarfile.PAX_FORMAT) + header
        offsets.append(position + len(head))
        parts += [head, content, bytes(-info.size % tarfile.BLOCKSIZE)]
        position += sum(map(len, parts[-3:]))
    return b"".join([*parts, _END]), offsets
