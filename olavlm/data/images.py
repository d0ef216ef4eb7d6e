"""From encoded bytes to the RGB square a network sees: decoding, and the three views."""

import contextlib
import io
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from olavlm.config import View

#: CLIP's mean colour (0.4815, 0.4578, 0.4082) in 8 bits: what the `pad` view fills with, as LLaVA does.
MEAN_COLOUR = (122, 116, 104)

#: Pixels of the largest image that is decoded: 256 MiB of RGB, where Pillow starts to warn of decompression bombs. A
#: constant, because it decides which images of a corpus have targets, for everyone who ever reads it.
MAX_PIXELS = 2**28 // 3

#: Pixels of the longest side that is decoded, as of a JPEG: what bounds the memory that a view takes of a narrow strip.
MAX_SIDE = 2**16 - 1


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded image to 8-bit RGB, upright, as `upright_rgb` makes it; an animation gives its first frame.

    The size is known before any pixel is decoded, so that a bomb costs nothing.

    Args:
        data: the bytes of a JPEG, PNG, WebP or any other file Pillow knows.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: the bytes are empty, truncated, damaged, no image, or more than `MAX_PIXELS` or `MAX_SIDE`. The
            message is the reason, the same for the same bytes.
    """
    if not data:
        raise ValueError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if max(image.size) > MAX_SIDE:
                raise ValueError(f"a side of {max(image.size)} pixels, more than {MAX_SIDE}")
            return upright_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("not an image in a known format") from None  # Pillow's own message holds a memory address
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error …
        raise ValueError(f"cannot be decoded: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in 8-bit RGB, upright; itself where it is that already, and never changed.

    EXIF orientation is applied, transparency is composited over white, 16-bit grey keeps its upper byte.
    """
    image.load()  # which turns a TIFF
    with contextlib.suppress(Exception):  # damaged EXIF turns nothing, as in a browser
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = image.copy()
            ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def apply_view(
    image: Image.Image, view: View, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Bring an image to the square a network takes.

    Of narrow strips, what lies between image and square could be far larger than any image. Where it would, the same
    picture is made of less, if not to the last bit.

    Args:
        image: mode RGB, any size.
        view: ``squash`` resizes both sides, whatever the aspect; ``pad`` centres the image on a square of its long
            side, filled with CLIP's mean colour, and resizes that (LLaVA's expand2square); ``center_crop`` resizes the
            short side and crops the centre (CLIP).
        size: side of the result in pixels.
        resample: filter of the one resize.

    Returns:
        An RGB image of size × size.
    """
    width, height = image.size
    match view:
        case "squash":
            return image.resize((size, size), resample)
        case "pad":
            across = down = max(width, height)
            if across * down > MAX_PIXELS:  # shrink the long side ahead of the other, where nothing is filled in
                if width > height:
                    across = width = size
                else:
                    down = height = size
                image = image.resize((width, height), resample)
            if (width, height) != (across, down):
                square = Image.new("RGB", (across, down), MEAN_COLOUR)
                square.paste(image, ((across - width) // 2, (down - height) // 2))
                image = square
            return image.resize((size, size), resample)
        case "center_crop":
            short = min(width, height)
            across, down = (size * side // short for side in (width, height))
            left, top = (across - size) // 2, (down - size) // 2
            if across * down > MAX_PIXELS:  # resize only what is kept of it
                x, y = width / across, height / down
                return image.resize((size, size), resample, (left * x, top * y, (left + size) * x, (top + size) * y))
            return image.resize((across, down), resample).crop((left, top, left + size, top + size))
        case _:
            assert_never(view)


def view_positions(points: NDArray[Any], image: tuple[int, int], view: View, size: int) -> NDArray[np.float64]:
    """Where points of an image lie in the square that `apply_view` makes of it, to within that one's rounding.

    Args:
        points: (…, 2) x and y in pixels from the image's upper left corner; the first pixel's centre is at (0.5, 0.5).
        image: its width and height.
        view: as in `apply_view`.
        size: side of the square in pixels.

    Returns:
        (…, 2) x and y as shares of the square; outside [0, 1] where the view cuts the point off.
    """
    width, height = image
    match view:
        case "squash":
            scaled = size * points / (width, height)
        case "pad":
            side = max(width, height)
            left_top = np.array([(side - width) // 2, (side - height) // 2])
            scaled = (points + left_top) * size / side
        case "center_crop":
            resized = [size * side // min(width, height) for side in (width, height)]
            left_top = np.array([(side - size) // 2 for side in resized])
            scaled = points * resized / (width, height) - left_top
        case _:
            assert_never(view)
    return np.asarray(scaled / size, np.float64)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode.startswith("I"):  # 16-bit grey; a plain convert() would clip everything above 255 to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy costs half as much as decoding does
