"""sensor_msgs images as RGB."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from worldvln_edge.ros_bridge.image_decoding import (
    ENCODINGS,
    CompressedImage,
    ImageMessageError,
    RawImage,
    decode_message,
)

_RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
_GREY = np.repeat(_RGB[..., :1], 3, axis=2)


def _raw(
    rows_HB: np.ndarray, encoding: str, *, width: int = 8, padding: int = 0, is_bigendian: bool = False
) -> RawImage:
    """Rows of bytes [H, B] as a message, each followed by `padding` bytes that are no pixels."""
    padded = np.concatenate([rows_HB, np.full((len(rows_HB), padding), 170, np.uint8)], axis=1)
    return RawImage(
        height=len(rows_HB),
        width=width,
        encoding=encoding,
        is_bigendian=is_bigendian,
        step=padded.shape[1],
        data=padded.tobytes(),
    )


def _with_alpha(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image, np.full((*image.shape[:2], 1), 7, np.uint8)], axis=-1)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("rgb8", _RGB, _RGB),
        ("bgr8", _RGB[..., ::-1], _RGB),
        ("8UC3", _RGB[..., ::-1], _RGB),
        ("rgba8", _with_alpha(_RGB), _RGB),
        ("bgra8", _with_alpha(_RGB[..., ::-1]), _RGB),
        ("mono8", _GREY[..., 0], _GREY),
        ("8UC1", _GREY[..., 0], _GREY),
    ],
)
def test_eight_bit_encodings_give_the_same_picture_with_padded_rows_too(encoding, pixels, expected, padding):
    image = decode_message(_raw(pixels.reshape(6, -1), encoding, padding=padding))
    np.testing.assert_array_equal(image, expected)
    assert image.flags.writeable
    assert image.flags.c_contiguous


@pytest.mark.parametrize("is_bigendian", [False, True])
@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("rgb16", _RGB, _RGB),
        ("bgr16", _RGB[..., ::-1], _RGB),
        ("rgba16", _with_alpha(_RGB), _RGB),
        ("bgra16", _with_alpha(_RGB[..., ::-1]), _RGB),
        ("mono16", _GREY[..., :1], _GREY),
    ],
)
def test_sixteen_bit_channels_are_read_in_their_byte_order(encoding, pixels, expected, is_bigendian):
    wide = (pixels.astype(np.uint16) * 256 + 99).astype(">u2" if is_bigendian else "<u2")
    rows = np.frombuffer(wide.tobytes(), np.uint8).reshape(6, -1)
    np.testing.assert_array_equal(decode_message(_raw(rows, encoding, is_bigendian=is_bigendian)), expected)


def _rgb_of_yuv(y: int, u: int, v: int) -> list[int]:
    """ITU-R BT.601 with limited range, one pixel at a time, by the usual rounded constants."""
    y, u, v = 1.164383 * (y - 16), u - 128, v - 128
    rgb = y + 1.596027 * v, y - 0.391762 * u - 0.812968 * v, y + 2.017232 * u
    return [min(255, max(0, round(value))) for value in rgb]


@pytest.mark.parametrize(
    ("encoding", "order"), [("yuv422", "uyvy"), ("uyvy", "uyvy"), ("yuv422_yuy2", "yuyv"), ("yuyv", "yuyv")]
)
@given(pairs=st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=1, max_size=6))
def test_yuv_pairs_share_their_colour(encoding, order, pairs):
    expected, rows = [], []
    for y0, u, y1, v in pairs:
        expected += [_rgb_of_yuv(y0, u, v), _rgb_of_yuv(y1, u, v)]
        rows += [u, y0, v, y1] if order == "uyvy" else [y0, u, y1, v]
    image = decode_message(_raw(np.array([rows], np.uint8), encoding, width=2 * len(pairs)))
    assert np.abs(image[0].astype(int) - np.array(expected)).max() <= 1


@pytest.mark.parametrize(("format", "text"), [("JPEG", "rgb8; jpeg compressed bgr8"), ("PNG", "png")])
def test_compressed_images_are_read_by_their_content(format, text):
    buffer = io.BytesIO()
    Image.fromarray(_RGB).save(buffer, format, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {}))
    image = decode_message(CompressedImage(format=text, data=buffer.getvalue()))
    assert np.abs(image.astype(int) - _RGB).max() <= (0 if format == "PNG" else 8)


def _message(**changes) -> RawImage:
    fields = {"height": 6, "width": 8, "encoding": "rgb8", "is_bigendian": False, "step": 24, "data": bytes(144)}
    return RawImage(**{**fields, **changes})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (_message(encoding="bayer_rggb8"), f"encoding 'bayer_rggb8' is not known; publish one of {ENCODINGS[0]}"),
        (_message(height=0, data=b""), "image of 8x0 pixels; publish images that have pixels"),
        (_message(width=9000, step=27000), "image of 9000x6 pixels is too large"),
        (_message(step=23), "step 23 is less than the 24 bytes of a row of 8 pixels rgb8; set step"),
        (_message(data=bytes(143)), "143 bytes of data, but 6 rows of 24 bytes are 144; check height and step"),
        (_message(encoding="yuyv", width=7), "yuyv image of odd width 7; two pixels share their colour"),
        (CompressedImage(format="jpeg", data=b""), "compressed image without bytes; check the camera driver"),
        (CompressedImage(format="16UC1; compressedDepth", data=b"1"), "is a depth image; give the topic of the colour"),
        (CompressedImage(format="jpeg", data=b"nothing"), "7 bytes: not a readable image; publish whole JPEG or PNG"),
    ],
)
def test_a_message_that_cannot_be_read_says_why(image, message):
    with pytest.raises(ImageMessageError, match=re.escape(message)):
        decode_message(image)
