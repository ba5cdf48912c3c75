"""sensor_msgs images as RGB, without cv_bridge.

Rows may be padded (`step`), 16-bit channels may stand in either byte order; nothing else of a message is guessed.

Legend: H W rows and columns, K channels.
Source: sensor_msgs/Image, sensor_msgs/CompressedImage, sensor_msgs/image_encodings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldvln_edge.images import ImageError, ImageLimits, decode_image

# Encoding -> bytes of a channel, channels of a pixel, which of them are red, green and blue.
_CHANNELS: dict[str, tuple[int, int, tuple[int, int, int]]] = {
    "rgb8": (1, 3, (0, 1, 2)),
    "bgr8": (1, 3, (2, 1, 0)),
    "rgba8": (1, 4, (0, 1, 2)),
    "bgra8": (1, 4, (2, 1, 0)),
    "mono8": (1, 1, (0, 0, 0)),
    "8UC1": (1, 1, (0, 0, 0)),
    "8UC3": (1, 3, (2, 1, 0)),  # OpenCV's own order
    "rgb16": (2, 3, (0, 1, 2)),
    "bgr16": (2, 3, (2, 1, 0)),
    "rgba16": (2, 4, (0, 1, 2)),
    "bgra16": (2, 4, (2, 1, 0)),
    "mono16": (2, 1, (0, 0, 0)),
}
# Encoding -> places of Y0, U, Y1, V in the four bytes of two pixels.
_YUV422 = {
    "yuv422": (1, 0, 3, 2),
    "uyvy": (1, 0, 3, 2),
    "yuv422_yuy2": (0, 1, 2, 3),
    "yuyv": (0, 1, 2, 3),
}
ENCODINGS = (*_CHANNELS, *_YUV422)


class ImageMessageError(ValueError):
    """An image message that cannot be read. `what_to_do` is the advice; the message says what was found."""

    def __init__(self, message: str, what_to_do: str):
        super().__init__(f"{message}; {what_to_do}")
        self.message, self.what_to_do = message, what_to_do


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """The fields of sensor_msgs/Image that say what its bytes are. `step` is the length of a row in bytes."""

    height: int
    width: int
    encoding: str
    is_bigendian: bool
    step: int
    data: bytes | bytearray | memoryview

    def check(self) -> None:
        """Raises ImageMessageError: unknown encoding, or sizes that contradict each other."""
        row_bytes = _row_bytes(self.encoding, self.width)
        limits = ImageLimits()
        if self.height < 1 or self.width < 1:
            raise ImageMessageError(f"image of {self.width}x{self.height} pixels", "publish images that have pixels")
        if max(self.height, self.width) > limits.max_side or self.height * self.width > limits.max_pixels:
            raise ImageMessageError(
                f"image of {self.width}x{self.height} pixels is too large (at most {limits.max_side} a side and "
                f"{limits.max_pixels} in all)",
                "have the camera driver scale it down",
            )
        if self.step < row_bytes:
            raise ImageMessageError(
                f"step {self.step} is less than the {row_bytes} bytes of a row of {self.width} pixels {self.encoding}",
                "set step to the bytes of a row, padding included",
            )
        if len(self.data) != self.step * self.height:
            raise ImageMessageError(
                f"{len(self.data)} bytes of data, but {self.height} rows of {self.step} bytes are "
                f"{self.step * self.height}",
                "check height and step in the camera driver",
            )


@dataclass(frozen=True, kw_only=True)
class CompressedImage:
    """The fields of sensor_msgs/CompressedImage. `format` is not trusted: the content says what it is."""

    format: str
    data: bytes | bytearray | memoryview

    def check(self) -> None:
        """Raises ImageMessageError: no bytes, or a depth image."""
        if not len(self.data):
            raise ImageMessageError("compressed image without bytes", "check the camera driver")
        if "compressedDepth" in self.format:
            raise ImageMessageError(
                f"compressed image of format {self.format!r} is a depth image", "give the topic of the colour camera"
            )


def decode_message(image: RawImage | CompressedImage) -> np.ndarray:
    """RGB of an image message: uint8 [H, W, 3], writable and contiguous.

    Grey is replicated, alpha dropped, 16 bits cut to the upper 8; YUV is ITU-R BT.601 with limited range, as cameras
    send it and OpenCV reads it.

    Raises:
        ImageMessageError: see `RawImage.check`, `CompressedImage.check`; or the compressed bytes are no image.
    """
    image.check()
    if isinstance(image, CompressedImage):
        try:
            return decode_image(bytes(image.data))
        except ImageError as error:
            raise ImageMessageError(
                f"compressed image of format {image.format!r}, {len(image.data)} bytes: {error}",
                "publish whole JPEG or PNG images",
            ) from error
    row_bytes = _row_bytes(image.encoding, image.width)
    rows = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)[:, :row_bytes]
    if image.encoding in _YUV422:
        return _rgb_of_yuv422(rows.reshape(image.height, image.width // 2, 4), _YUV422[image.encoding])
    channel_bytes, channels, rgb = _CHANNELS[image.encoding]
    upper = 0 if channel_bytes == 1 or image.is_bigendian else 1
    pixels_HWK = rows.reshape(image.height, image.width, channels, channel_bytes)[..., upper]
    return np.ascontiguousarray(pixels_HWK[..., list(rgb)])


def _row_bytes(encoding: str, width: int) -> int:
    if encoding in _YUV422:
        if width % 2:
            raise ImageMessageError(
                f"{encoding} image of odd width {width}", "two pixels share their colour: give an even width"
            )
        return 2 * width
    if encoding not in _CHANNELS:
        raise ImageMessageError(f"encoding {encoding!r} is not known", f"publish one of {', '.join(ENCODINGS)}")
    channel_bytes, channels, _ = _CHANNELS[encoding]
    return channel_bytes * channels * width


def _rgb_of_yuv422(pairs_HP4: np.ndarray, places: tuple[int, int, int, int]) -> np.ndarray:
    """Two pixels (P pairs in a row) share U and V."""
    values = pairs_HP4.astype(np.float32)
    y_HW = (values[..., [places[0], places[2]]].reshape(len(values), -1) - 16.0) * (255.0 / 219.0)
    u_HW = np.repeat(values[..., places[1]] - 128.0, 2, axis=1)
    v_HW = np.repeat(values[..., places[3]] - 128.0, 2, axis=1)
    red, blue = 1.402 * 255 / 224, 1.772 * 255 / 224
    rgb = np.stack(
        [y_HW + red * v_HW, y_HW - 0.344136 * 255 / 224 * u_HW - 0.714136 * 255 / 224 * v_HW, y_HW + blue * u_HW],
        axis=-1,
    )
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
