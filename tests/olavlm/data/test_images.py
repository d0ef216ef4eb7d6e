import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor

from olavlm.config import View
from olavlm.data import images
from olavlm.data.images import MAX_PIXELS, MAX_SIDE, MEAN_COLOUR, apply_view, decode_image, upright_rgb, view_positions

RNG = np.random.default_rng(0)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_lossless_formats_decode_to_the_same_pixels(kind):
    image = noise(17, 9)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_image(encode(image, kind, **options)), image)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("L", "JPEG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
    ],
)
def test_every_mode_becomes_rgb(mode, kind):
    source = Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode)
    decoded = decode_image(encode(source, kind))
    assert decoded.mode == "RGB"
    assert decoded.size == (8, 6)
    assert decoded.getpixel((3, 3)) == (255, 255, 255)


def test_transparency_is_composited_over_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    decoded = decode_image(encode(image, "PNG"))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]


def test_a_transparent_palette_entry_is_composited_over_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, "PNG", transparency=0))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), "PNG")))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_exif_orientation_is_applied():
    image = noise(20, 10)
    decoded = decode_image(encode(image, "PNG", exif=turned(6)))
    assert np.array_equal(decoded, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("RGB", "TIFF")])
def test_an_opened_image_becomes_what_is_decoded_of_its_file(orientation, mode, kind):
    data = encode(noise(20, 10).convert(mode), kind, exif=turned(orientation))
    decoded = decode_image(data)
    assert np.array_equal(decoded, ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(upright_rgb(opened), decoded)
    assert np.array_equal(upright_rgb(opened), decoded), "the image itself stays as it is"
    assert np.array_equal(upright_rgb(decoded), decoded), "nothing is turned twice"


def test_an_image_that_is_upright_rgb_is_not_copied():
    image = noise(4, 3)
    assert upright_rgb(image) is image


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_keeps_its_colour():
    red, green, blue = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


def test_sixteen_bit_colour_keeps_its_upper_byte():
    decoded = decode_image(png_header(2, 1, depth=16, pixels=bytes([0, 1, 200, 5, 9, 255]) * 2))
    assert decoded.getpixel((1, 0)) == (0, 200, 9)


def png_header(width: int, height: int, depth: int = 8, pixels: bytes = b"") -> bytes:
    """An RGB PNG that says it has this size, whatever it holds."""
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, depth, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + pixels)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as it is outside of tests
@pytest.mark.parametrize("side", [9_460, 20_000, 2**31 - 1])  # Pillow itself would decode the first
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(ValueError, match=f"more than {MAX_PIXELS} pixels"):
        decode_image(png_header(side, side))


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (1, MAX_PIXELS)])
def test_a_strip_longer_than_any_jpeg_is_refused_before_it_is_decoded(size):
    with pytest.raises(ValueError, match=f"a side of {max(size)} pixels, more than {MAX_SIDE}"):
        decode_image(png_header(*size))


def test_the_longest_strip_is_decoded():
    assert decode_image(encode(Image.new("RGB", (1, MAX_SIDE)), "PNG")).size == (1, MAX_SIDE)


def test_the_largest_image_is_not_taken_for_a_bomb(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    assert decode_image(encode(noise(4, 3), "PNG")).size == (4, 3)
    with pytest.raises(ValueError, match="more than 12 pixels"):
        decode_image(encode(noise(13, 1), "PNG"))


@pytest.mark.parametrize("data", [b"", b"\x00", b"no image at all" * 40, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_image_has_a_reason(data):
    with pytest.raises(ValueError, match=r"empty file|not an image|cannot be decoded") as reason:
        decode_image(data)
    assert "0x" not in str(reason.value), "a memory address would make the index differ from run to run"


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 0.98), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))
def test_a_truncated_image_is_refused(cut, kind):
    data = encode(noise(40, 30), kind)
    with pytest.raises(ValueError, match=r"\w"):
        decode_image(data[: int(len(data) * cut)])


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=200),
    prefix=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF", b"GIF89a"]),
)
def test_hostile_bytes_raise_nothing_but_value_error(data, prefix):
    with suppress(ValueError):
        decode_image(prefix + data)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    size=st.integers(1, 40),
    view=st.sampled_from(["squash", "pad", "center_crop"]),
)
def test_every_view_gives_the_square(width, height, size, view):
    square = apply_view(Image.new("RGB", (width, height)), view, size)
    assert square.size == (size, size)
    assert square.mode == "RGB"


@pytest.mark.parametrize("view", ["squash", "pad", "center_crop"])
def test_a_square_image_looks_the_same_in_every_view(view):
    image = noise(30, 30)
    assert np.array_equal(apply_view(image, view, 12), image.resize((12, 12), Image.Resampling.BICUBIC))


def test_pad_centres_on_the_mean_colour():
    padded = np.asarray(apply_view(Image.new("RGB", (40, 20), "black"), "pad", 40))
    assert (padded[:10] == MEAN_COLOUR).all()
    assert (padded[10:30] == 0).all()
    assert (padded[30:] == MEAN_COLOUR).all()
    upright = np.asarray(apply_view(Image.new("RGB", (20, 40), "black"), "pad", 40))
    assert np.array_equal(upright, padded.transpose(1, 0, 2))


@pytest.mark.parametrize("size", [(50, 33), (33, 50), (47, 20), (7, 90)])
def test_center_crop_is_what_clip_does(size):
    image = noise(*size)
    clip = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24, do_rescale=False, do_normalize=False)
    expected = np.asarray(clip(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(apply_view(image, "center_crop", 24)), expected)


@pytest.mark.parametrize("size", [(200, 3), (3, 200), (90, 50), (50, 90), (1, 70)])
@pytest.mark.parametrize("view", ["pad", "center_crop"])
def test_where_memory_has_to_be_saved_the_picture_is_the_same(monkeypatch, size, view):
    image = noise(5, 5).resize(size)
    expected = np.asarray(apply_view(image, view, 24), int)
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    assert np.abs(np.asarray(apply_view(image, view, 24), int) - expected).max() <= 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be kept from taking memory")
def test_no_shape_of_an_image_takes_much_memory():
    """In a process that may take 512 MiB more than it has: a crop would resize to 9 GB, a padded square take 1.6."""
    script = """if True:
        import resource
        from itertools import product
        from pathlib import Path
        from PIL import Image
        from olavlm.data.images import MAX_SIDE, apply_view

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, taken + 2**29))
        for long, short in ((20_000, 1_000), (20_000, 1), (MAX_SIDE, 1)):
            for size, view in product(((long, short), (short, long)), ("squash", "pad", "center_crop")):
                apply_view(Image.new("RGB", size), view, 336)
        """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(24, 120), st.integers(24, 120)),
    at=st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
    view=st.sampled_from(["squash", "pad", "center_crop"]),
)
def test_a_point_is_where_the_view_puts_it(size: tuple[int, int], at: tuple[float, float], view: View) -> None:
    """A white patch on black: its centre of mass in the view is where its centre is said to be."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    left, top = (round(share * side) - 2 for share, side in zip(at, size, strict=True))
    pixels[top : top + 5, left : left + 5] = 255
    seen = np.asarray(apply_view(Image.fromarray(pixels), view, 96, Image.Resampling.BOX))[..., 0].astype(float)
    if view == "pad":  # what is filled in is grey
        seen[seen < 130] = 0
    middle = np.array([left + 2.5, top + 2.5])
    expected = 96 * view_positions(middle, size, view, 96)
    if expected.min() > 12 and expected.max() < 84:  # all of the patch is seen
        found = [(seen * (index + 0.5)).sum() / seen.sum() for index in np.indices(seen.shape)[::-1]]
        assert found == pytest.approx(expected, abs=1)


def test_what_a_view_cuts_off_lies_outside() -> None:
    corners = np.array([[0.0, 0.0], [200.0, 100.0], [100.0, 50.0]])
    assert view_positions(corners, (200, 100), "squash", 64).tolist() == [[0, 0], [1, 1], [0.5, 0.5]]
    assert view_positions(corners, (200, 100), "pad", 64).tolist() == [[0, 0.25], [1, 0.75], [0.5, 0.5]]
    assert view_positions(corners, (200, 100), "center_crop", 64).tolist() == [[-0.5, 0], [1.5, 1], [0.5, 0.5]]
