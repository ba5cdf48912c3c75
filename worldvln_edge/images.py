"""Images in and out: encoded bytes to RGB, RGB to what the networks read, network frames back to RGB.

Legend: H W rows and columns, F frames. RGB everywhere; uint8 [H, W, 3] outside of the networks.
Source: spec/session_protocol.md 2.3, 2.4, 7.8; spec/video_vae.md 5, 12; spec/action_decoder.md 8.
"""

import base64
import binascii
import io
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from worldvln_edge.image_header import BadHeaderError, ImageHeader, UnknownFormatError, read_image_header

EMPTY_STRING = "empty image string"
NOT_BASE64 = "not base64"
NOT_READABLE = "not a readable image"
FORMAT_NOT_ACCEPTED = "format not accepted"

_DATA_URL = re.compile(r"data:image/[^;,]*;base64,", re.IGNORECASE)
_ASCII_SPACE = re.compile(r"[ \t\r\n\f\v]+")
# What the decoders of the accepted formats raise on broken data.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """An image that is refused. The message may be shown to a client: a fixed phrase, or the limit that was passed."""

    def __init__(self, message: str, code: Literal["bad_image", "too_large"] = "bad_image"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Largest accepted image (spec/session_protocol.md 7.8)."""

    max_bytes: int = 8 * 2**20
    max_pixels: int = 16_000_000
    max_side: int = 8192
    max_aspect: int = 32
    """Longer over shorter side. The network's input covers its target, so a strip of one row would be blown up."""

    def check_aspect(self, width: int, height: int) -> None:
        """Raise ImageError `too_large` for a strip."""
        if max(width, height) > self.max_aspect * min(width, height):
            raise ImageError(f"image of {width}x{height} is narrower than 1:{self.max_aspect}", "too_large")


def decode_image_string(text: str, limits: ImageLimits | None = None) -> np.ndarray:
    """Decode a data URL (`data:image/...;base64,...`) or bare base64: uint8 [H, W, 3].

    Raises:
        ImageError: see `read_image_string` and `decode_image`.
    """
    return decode_image(read_image_string(text, limits), limits)


def read_image_string(text: str, limits: ImageLimits | None = None) -> bytes:
    """The encoded image in a data URL (`data:image/...;base64,...`) or bare base64.

    Raises:
        ImageError: empty, not base64, or too large.
    """
    limits = limits or ImageLimits()
    text = text.strip()
    payload = _DATA_URL.sub("", text, count=1) if _DATA_URL.match(text) else text
    payload = _ASCII_SPACE.sub("", payload)
    if not payload:
        raise ImageError(EMPTY_STRING)
    if len(payload) > 4 * (-(-limits.max_bytes // 3)):
        raise ImageError(f"image is larger than {limits.max_bytes} bytes", "too_large")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(NOT_BASE64) from error


def decode_image(data: bytes, limits: ImageLimits | None = None) -> np.ndarray:
    """Decode a JPEG, PNG, WebP or BMP, told by its content: uint8 [H, W, 3] RGB, writable.

    Alpha is dropped, grey replicated, 16-bit cut to its upper 8 bits; orientation tags are ignored and an animation
    gives its first frame. Size limits are checked on the header, before a pixel is decoded.

    Raises:
        ImageError: `too_large` over a limit; else `bad_image` with "not a readable image" (no image, truncated,
            corrupted) or "format not accepted".
    """
    limits = limits or ImageLimits()
    if len(data) > limits.max_bytes:
        raise ImageError(f"image has {len(data)} bytes, limit {limits.max_bytes}", "too_large")
    try:
        header = read_image_header(data)
    except UnknownFormatError as error:
        raise ImageError(FORMAT_NOT_ACCEPTED if error.is_other_format else NOT_READABLE) from error
    except BadHeaderError as error:
        raise ImageError(NOT_READABLE) from error
    if header.width * header.height > limits.max_pixels:
        raise ImageError(f"image has {header.width}x{header.height} pixels, limit {limits.max_pixels}", "too_large")
    if max(header.width, header.height) > limits.max_side:
        raise ImageError(
            f"image side is {max(header.width, header.height)} pixels, limit {limits.max_side}", "too_large"
        )
    limits.check_aspect(header.width, header.height)
    try:
        return _decode(data, header)
    except _DECODER_ERRORS as error:
        raise ImageError(NOT_READABLE) from error


def _decode(data: bytes, header: ImageHeader) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
        if image.size != (header.width, header.height):
            raise ValueError("header and decoder disagree about the size")
        image.load()
        if image.mode.startswith("I"):
            grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def fit_frame(image_HW3: np.ndarray, target_hw: tuple[int, int]) -> np.ndarray:
    """Cover the target keeping the aspect (LANCZOS), then cut its centre: uint8 [*target_hw, 3].

    A frame that has the target's size is returned as it is, so fitting twice changes nothing.

    Args:
        image_HW3: uint8 RGB.
        target_hw: network size.

    Raises:
        ValueError: not uint8 [H, W, 3].
    """
    (th, tw), (h, w) = target_hw, check_rgb(image_HW3).shape[:2]
    if (h, w) == (th, tw):
        return image_HW3
    # Kept in this order of operations: int() cuts, so another rounding would give another size.
    rw, rh = (tw, int(tw / (w / h))) if w / h <= tw / th else (int((w / h) * th), th)
    rw, rh = max(rw, tw), max(rh, th)
    resized = np.asarray(Image.fromarray(image_HW3).resize((rw, rh), Image.Resampling.LANCZOS))
    y0, x0 = (rh - th) // 2, (rw - tw) // 2
    return np.ascontiguousarray(resized[y0 : y0 + th, x0 : x0 + tw])


def transform(image_HW3: np.ndarray, target_hw: tuple[int, int]) -> np.ndarray:
    """What the VAE reads: the fitted frame, scaled to [-1, 1].

    Args:
        image_HW3: uint8 RGB.
        target_hw: network size.

    Returns:
        float32 [3, *target_hw].

    Raises:
        ValueError: not uint8 [H, W, 3].
    """
    x = fit_frame(image_HW3, target_hw).transpose(2, 0, 1).astype(np.float32, order="C")
    x /= np.float32(255.0)
    x += x
    x -= np.float32(1.0)
    return x


def rgb_head_input(
    frames: Sequence[np.ndarray],
    target_hw: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    pre_resize_hw: tuple[int, int] | None = None,
) -> np.ndarray:
    """What the RGB head reads: bilinear resize (antialiased when shrinking), no crop, normalised.

    Args:
        frames: uint8 RGB [H, W, 3] each, any size.
        target_hw: the head's image size.
        mean, std: per channel, of frames in [0, 1].
        pre_resize_hw: resize to this size first (bilinear); None does not.

    Returns:
        float32 [F, 3, *target_hw].
    """
    result = np.empty((len(frames), 3, *target_hw), np.float32)
    for row, frame in zip(result, frames, strict=True):
        image = Image.fromarray(check_rgb(frame))
        for h, w in (pre_resize_hw, target_hw) if pre_resize_hw else (target_hw,):
            image = image.resize((w, h), Image.Resampling.BILINEAR)
        row[:] = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255.0)
    channel = (1, 3, 1, 1)
    return (result - np.array(mean, np.float32).reshape(channel)) / np.array(std, np.float32).reshape(channel)


def predicted_to_uint8(frames_3HW: np.ndarray) -> np.ndarray:
    """Decoded frames to RGB: trunc(clamp((x+1)/2, 0, 1)*255). float [..., 3, H, W] -> uint8 [..., H, W, 3]."""
    x = np.asarray(frames_3HW, np.float32)
    x = np.clip((x + np.float32(1.0)) / np.float32(2.0), 0.0, 1.0) * np.float32(255.0)
    return np.ascontiguousarray(np.moveaxis(x.astype(np.uint8), -3, -1))


def real_to_uint8(frames_3HW: np.ndarray) -> np.ndarray:
    """Preprocessed camera frames back to RGB, rounding half to even. float [..., 3, H, W] -> uint8 [..., H, W, 3]."""
    x = np.clip(np.asarray(frames_3HW, np.float32), -1.0, 1.0)
    x = np.clip((x + np.float32(1.0)) * np.float32(127.5), 0.0, 255.0)
    return np.ascontiguousarray(np.moveaxis(np.rint(x).astype(np.uint8), -3, -1))


def check_rgb(image_HW3: np.ndarray) -> np.ndarray:
    """The image itself. Raises ValueError unless it is uint8 [H, W, 3] with at least one pixel."""
    if not (
        isinstance(image_HW3, np.ndarray)
        and image_HW3.dtype == np.uint8
        and image_HW3.ndim == 3
        and image_HW3.shape[2] == 3
        and image_HW3.size > 0
    ):
        found = f"{image_HW3.dtype} {list(image_HW3.shape)}" if isinstance(image_HW3, np.ndarray) else type(image_HW3)
        raise ValueError(f"a frame must be uint8 [H, W, 3] RGB, found {found}")
    return image_HW3
