"""Format and size of an encoded still image, from its first bytes and without decoding a pixel.

A size limit has to be checked before a decoder allocates anything, and an image library refuses or warns about huge
sizes on its own terms, so the few header fields are read here.
Source: spec/session_protocol.md 2.4.
"""

import struct
from typing import Literal, NamedTuple

Format = Literal["JPEG", "PNG", "WEBP", "BMP"]

# Formats that are recognised only to say that they are not accepted.
_OTHER_SIGNATURES = (
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"8BPS",
    b"\0\0\1\0",
    b"\0\0\0\x0cjP  ",
    b"qoif",
    b"DDS ",
)
_OTHER_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_JPEG_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
_JPEG_NOT_A_FRAME = frozenset({0xC4, 0xC8, 0xCC})


class ImageHeader(NamedTuple):
    format: Format
    width: int
    height: int


class UnknownFormatError(ValueError):
    """Not one of the accepted formats. `is_other_format`: it is an image, of a kind that is not accepted."""

    def __init__(self, is_other_format: bool):
        super().__init__("another image format" if is_other_format else "no image signature")
        self.is_other_format = is_other_format


class BadHeaderError(ValueError):
    """An accepted signature whose header is cut off or contradicts itself."""


def read_image_header(data: bytes) -> ImageHeader:
    """Format and size of a JPEG, PNG, WebP or BMP.

    Raises:
        UnknownFormatError: another format, or no image at all.
        BadHeaderError: the header is truncated, or a side is below 1.
    """
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            header = ImageHeader("PNG", *struct.unpack_from(">II", data, 16))
        elif data.startswith(b"\xff\xd8\xff"):
            header = ImageHeader("JPEG", *_jpeg_size(data))
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            header = ImageHeader("WEBP", *_webp_size(data))
        elif data.startswith(b"BM"):
            header = ImageHeader("BMP", *_bmp_size(data))
        else:
            is_container = data[4:8] == b"ftyp" and data[8:12] in _OTHER_BRANDS
            raise UnknownFormatError(is_container or data.startswith(_OTHER_SIGNATURES))
    except (struct.error, IndexError) as error:
        raise BadHeaderError("the header is cut off") from error
    if header.width < 1 or header.height < 1:
        raise BadHeaderError("a side is below one pixel")
    return header


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise BadHeaderError("a JPEG segment does not start with a marker")
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        at += 1
        if marker in _JPEG_WITHOUT_LENGTH:
            continue
        if marker in (0xD9, 0xDA):
            raise BadHeaderError("JPEG data starts before its frame header")
        if 0xC0 <= marker <= 0xCF and marker not in _JPEG_NOT_A_FRAME:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        at += struct.unpack_from(">H", data, at)[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(_bytes_at(data, 24, 3), "little"), 1 + int.from_bytes(
            _bytes_at(data, 27, 3), "little"
        )
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise BadHeaderError("unknown WebP chunk")


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # a negative height means rows from top to bottom


def _bytes_at(data: bytes, at: int, count: int) -> bytes:
    if len(data) < at + count:
        raise IndexError
    return data[at : at + count]
