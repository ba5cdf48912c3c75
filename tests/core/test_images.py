"""Image decoding, preprocessing and the way back; every refusal."""

import base64
import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from worldvln_edge.image_header import BadHeaderError, UnknownFormatError, read_image_header
from worldvln_edge.images import (
    ImageError,
    ImageLimits,
    decode_image,
    decode_image_string,
    predicted_to_uint8,
    real_to_uint8,
    rgb_head_input,
    transform,
)

MEAN, STD = (0.3, 0.4, 0.5), (0.1, 0.2, 0.3)
ENCODINGS = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG", "quality": 95},
    "progressive jpeg": {"format": "JPEG", "progressive": True},
    "webp": {"format": "WEBP", "quality": 90},
    "lossless webp": {"format": "WEBP", "lossless": True},
    "bmp": {"format": "BMP"},
}
LOSSLESS = ("png", "lossless webp", "bmp")


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x, 8 * y, 2 * (x + y)], axis=2).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_accepted_format_decodes_by_its_content(name):
    image = picture()
    data = encoded(image, **ENCODINGS[name])
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8
    assert decoded.shape == image.shape
    assert np.abs(decoded.astype(int) - image).max() <= (0 if name in LOSSLESS else 40)
    assert read_image_header(data)[1:] == (40, 24)
    decoded[0, 0] = 0


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "bmp"])
def test_a_truncated_image_is_never_decoded(name):
    data = encoded(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8), **ENCODINGS[name])
    # Behind the last pixel come only end markers (JPEG 2 bytes, PNG checksum and IEND 16): not truncation of pixels.
    for keep in range(0, len(data) - 17, max(1, len(data) // 60)):
        with pytest.raises(ImageError, match="not a readable image") as caught:
            decode_image(data[:keep])
        assert caught.value.code == "bad_image"


def test_alpha_is_dropped_and_grey_replicated():
    rgb = picture()
    alpha = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 7, np.uint8)]))
    np.testing.assert_array_equal(decode_image(encoded(alpha, format="PNG")), rgb)
    grey = rgb[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(grey), format="PNG")), expected)
    deep = Image.fromarray(grey.astype(np.uint16) << 8)
    np.testing.assert_array_equal(decode_image(encoded(deep, format="PNG")), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    first, second = picture(), 255 - picture()
    data = encoded(
        Image.fromarray(first), format=kind, save_all=True, append_images=[Image.fromarray(second)], lossless=True
    )
    np.testing.assert_array_equal(decode_image(data), first)


def test_orientation_tags_are_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(picture(), format="JPEG", exif=exif)).shape == picture().shape


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "ICO"])
def test_other_image_formats_are_named_as_not_accepted(kind):
    with pytest.raises(ImageError, match=r"^format not accepted$"):
        decode_image(encoded(picture(), format=kind))


@pytest.mark.parametrize(
    "data", [b"", b"hello world", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"RIFF1234WEBP"]
)
def test_what_is_no_image_is_not_readable(data):
    with pytest.raises(ImageError, match=r"^not a readable image$"):
        decode_image(data)


def test_sizes_are_checked_before_pixels_are_decoded():
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII5B", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0)
    with pytest.raises(ImageError, match=r"^image has 60000x60000 pixels, limit 16000000$") as caught:
        decode_image(huge)
    assert caught.value.code == "too_large"
    data = encoded(picture(), format="PNG")
    with pytest.raises(ImageError, match=r"^image side is 40 pixels, limit 39$"):
        decode_image(data, ImageLimits(max_side=39))
    with pytest.raises(ImageError, match=f"^image has {len(data)} bytes, limit 10$") as caught:
        decode_image(data, ImageLimits(max_bytes=10))
    assert caught.value.code == "too_large"
    assert decode_image(data, ImageLimits(max_side=40, max_pixels=960, max_bytes=len(data))).shape == (24, 40, 3)


def test_image_strings_decode_with_and_without_data_url():
    data = encoded(picture(), format="PNG")
    text = base64.b64encode(data).decode()
    broken_lines = "\n".join(text[i : i + 20] for i in range(0, len(text), 20))
    for string in (text, f"  {text}\n", broken_lines, f"data:image/png;base64,{text}", f"DATA:Image/x;BASE64,{text}"):
        np.testing.assert_array_equal(decode_image_string(string), picture())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty image string"),
        (" \n", "empty image string"),
        ("data:image/png;base64,", "empty image string"),
        ("!!!", "not base64"),
        ("aGVsbG8", "not base64"),
        ("aGVs*bG8=", "not base64"),
        ("aGVsbG8é", "not base64"),
        ("data:image/png;charset=utf-8;base64,aGVsbG8=", "not base64"),
        ("http://host/image.png", "not base64"),
        ("aGVsbG8gd29ybGQ=", "not a readable image"),
        (base64.b64encode(b"GIF89a").decode(), "format not accepted"),
    ],
)
def test_every_bad_image_string_has_its_phrase(text, message):
    with pytest.raises(ImageError, match=f"^{message}$"):
        decode_image_string(text)


def test_a_long_string_is_refused_before_it_is_decoded():
    with pytest.raises(ImageError, match="larger than 3 bytes") as caught:
        decode_image_string("A" * 8, ImageLimits(max_bytes=3))
    assert caught.value.code == "too_large"


@given(
    st.binary(max_size=64),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"RIFF\0\0\0\0WEBPVP8X"]),
)
@settings(max_examples=200, deadline=None)
def test_no_bytes_raise_anything_but_an_image_error(tail, signature):
    data = signature + tail
    with contextlib.suppress(ImageError):
        assert decode_image(data).dtype == np.uint8
    with contextlib.suppress(UnknownFormatError, BadHeaderError):
        read_image_header(data)


@given(*[st.integers(1, 90)] * 2, *[st.integers(1, 70)] * 2)
@settings(max_examples=100, deadline=None)
def test_transform_always_gives_the_target_size_in_range(height, width, th, tw):
    out = transform(np.full((height, width, 3), 255, np.uint8), (th, tw))
    assert out.shape == (3, th, tw)
    assert out.dtype == np.float32
    assert (out == 1.0).all()


def test_transform_crops_the_centre_and_keeps_the_aspect():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert (transform(image, (10, 10)) == 1.0).all()
    assert (transform(image.transpose(1, 0, 2).copy(), (10, 10)) == 1.0).all()


@pytest.mark.parametrize(
    "frame", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), [[1]]]
)
def test_a_frame_that_is_not_rgb_is_refused(frame):
    with pytest.raises(ValueError, match="uint8 \\[H, W, 3\\] RGB"):
        transform(frame, (4, 4))
    with pytest.raises(ValueError, match="uint8 \\[H, W, 3\\] RGB"):
        rgb_head_input([frame], (4, 4), MEAN, STD)


def test_rgb_head_input_normalises_each_channel():
    frames = [np.full((5, 7, 3), value, np.uint8) for value in (0, 255)]
    out = rgb_head_input(frames, (4, 6), MEAN, STD, pre_resize_hw=(8, 8))
    assert out.shape == (2, 3, 4, 6)
    for channel in range(3):
        np.testing.assert_allclose(out[0, channel], -MEAN[channel] / STD[channel], rtol=1e-6)
        np.testing.assert_allclose(out[1, channel], (1 - MEAN[channel]) / STD[channel], rtol=1e-6)


def test_real_frames_round_half_to_even_and_predicted_frames_truncate():
    levels = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32)
    frames = np.broadcast_to(levels, (2, 3, 1, 5))
    assert real_to_uint8(frames).shape == (2, 1, 5, 3)
    assert real_to_uint8(frames)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]  # 127.5 rounds to 128
    assert predicted_to_uint8(frames)[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255]


@given(st.integers(0, 255))
def test_every_grey_level_survives_the_way_to_the_network_and_back(level):
    image = np.full((4, 4, 3), level, np.uint8)
    assert (real_to_uint8(transform(image, (4, 4))) == level).all()


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (330, 10)])
def test_a_strip_is_refused_before_it_is_blown_up(size):
    data = io.BytesIO()
    Image.new("RGB", size).save(data, "PNG")
    with pytest.raises(ImageError, match="narrower than 1:32") as refusal:
        decode_image(data.getvalue())
    assert refusal.value.code == "too_large"
