"""From an encoded image to the channels of the model, or a sentence why not; nobody has looked at the files."""

import io
import os
import re
import stat
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from .augment import SmallestCrop

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Pictures of pixels. What else Pillow opens is a document that runs Ghostscript (EPS), a drawing, or wants a library.
# TGA is the last: it is not known by its first bytes.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "ICO", "ICNS", "CUR", "PSD"),
    *("QOI", "DDS", "PCX", "DCX", "SGI", "SUN", "IM", "MSP", "XBM", "XPM", "FITS", "TGA"),
)
MOST_PIXELS = 100_000_000  # in an image; ten times that of a good camera, 300 MB decoded
LONGEST_SIDES = 100  # the longer side over the shorter one; resizing the shorter one to 256 would fill the memory
MOST_PIXELS_IN_A_BYTE = 400  # of a JPEG; a flat picture has a bit for each of the 6 blocks of its 16x16 pixels: 340
SCAN, END = b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)  # of a JPEG, but those among the pixels of a scan
MOST_SCANS = 64  # of a JPEG, each of which goes over all of its pixels; encoders write 10, or 18 for four colours
ROTATED = (5, 6, 7, 8)  # orientations of EXIF that swap width and height


class BadImageError(ValueError):
    """An image that cannot be used, because of its file or of its label; the message names it."""


def printable(text: str) -> str:
    """A text on one line, without what would steer a terminal or could not be printed: those become \\x1b and such."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def decode_image(record: dict[str, Any], num_channels: int) -> Tensor:
    """An encoded image as the channels of the model: {"bytes", "path"} -> (C, H, W) uint8; see `open_image`."""
    return v2.functional.pil_to_tensor(open_image(record, num_channels))


def open_image(
    record: dict[str, Any] | None,
    num_channels: int,
    smallest_crop: SmallestCrop | None = None,
    name: str = "an image without a path",
) -> Image.Image:
    """An encoded image, decoded, with the channels of the model: {"bytes", "path"} -> PIL image in L, RGB or RGBA.

    The picture is turned upright as its EXIF data says. Transparency is dropped, as transformers' image pipelines do
    it, so that training and later use see the same colours. 16-bit values keep their high byte. Of an animation, the
    first picture counts.

    Args:
        record: the file's bytes, or its path where there are none; None, or neither, is an image that is missing.
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        smallest_crop: decode a JPEG at 1/2, 1/4 or 1/8 of its size, if this crop of it has then pixels enough; libjpeg
            then leaves out the high frequencies of each block, which is another filter than that of resizing.
        name: what an image without a path is called.

    Raises:
        BadImageError: the image is missing, cannot be read, is too large, or is too long and thin.
    """
    record, content = record or {"bytes": None, "path": None}, b""
    try:
        content = _content(record)
        with Image.open(io.BytesIO(content), formats=_formats()) as file:
            _refuse_what_it_says(file, content)
            orientation = file.getexif().get(0x0112, 1)
            if smallest_crop is not None:
                width, height = reversed(file.size) if orientation in ROTATED else file.size
                if (reduction := smallest_crop.reduction(width, height)) > 1:
                    file.draft(None, (file.width // reduction, file.height // reduction))  # does nothing but to a JPEG
            image: Image.Image = file
            image.load()
            if file.format == "PNG" and _last_rows_are_black(image) and not _has_all_rows(content):
                raise ValueError("rows of it are missing.")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                image = _high_byte(image)
            elif image.mode == "F":
                raise ValueError("its pixels are floats, which have no known range.")
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            mode = PIL_MODES[num_channels]
            return image if image.mode == mode else image.convert(mode)  # which would copy it all the same
    except Exception as error:  # mutated files make PIL raise a dozen other errors than its own
        reason = _reason(error, content)
        raise BadImageError(f"{printable(record['path'] or name)} cannot be read as an image: {reason}") from error


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text names an object by its address
        return "its bytes begin like no format of images." if content else "it is empty."
    return printable(str(error) or type(error).__name__)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of the files that are images, in small letters, without the dot."""
    formats = {*_formats(), "MPO"}  # which the reader of JPEG opens
    return frozenset(suffix[1:] for suffix, kind in Image.registered_extensions().items() if kind in formats)


def _content(record: dict[str, Any]) -> bytes:
    if record["bytes"] is not None:
        return record["bytes"]
    path = record["path"]
    if path is None:
        raise ValueError("there is none.")
    if "://" in path:  # of a stream: a file on the Hub, or inside an archive
        with xopen(path, "rb") as remote:
            return remote.read()
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise ValueError("it is not a file.")
    return Path(path).read_bytes()


def _refuse_what_it_says(file: Image.Image, content: bytes) -> None:
    """Refuse what would take too long or too much memory, before a pixel is decoded."""
    shorter, longer = sorted(file.size)
    if shorter * longer > MOST_PIXELS or longer > LONGEST_SIDES * shorter:
        raise ValueError(f"it says that it has {file.width}x{file.height} pixels.")
    if file.format in ("JPEG", "MPO"):
        if shorter * longer > len(content) * MOST_PIXELS_IN_A_BYTE:  # libjpeg would fill in grey
            raise ValueError(f"it says that it has {file.width}x{file.height} pixels, in {len(content)} bytes.")
        if content.count(SCAN) > MOST_SCANS and (scans := _scans(content)) > MOST_SCANS:
            raise ValueError(f"it is a JPEG of {scans} scans.")


def _scans(jpeg: bytes) -> int:
    """The scans of the image itself, without a thumbnail in one of its segments, or the film that a phone puts behind.

    A segment is a marker, its length in two bytes, and its content; after that of a scan its pixels follow.
    """
    scans, position = 0, 2
    while (marker := MARKER.search(jpeg, position)) and marker[0] != END:
        scans += marker[0] == SCAN
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2])
    return scans


def _last_rows_are_black(image: Image.Image) -> bool:
    """Whether one of the last two is all 0, as missing ones are; an interlaced file has one of each kind."""
    rows = (image.crop((0, row, image.width, row + 1)) for row in range(max(image.height - 2, 0), image.height))
    return any(not np.asarray(row).any() for row in rows)


def _has_all_rows(png: bytes) -> bool:
    """Whether a PNG has as many bytes of pixels as its header says; PIL leaves rows that are missing black."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    # Of an interlaced image the pixels of each pass: their first row and column, and the steps between them.
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    expected = 0
    for row, column, rows, columns in passes if interlaced else [(0, 0, 1, 1)]:
        across, down = -(-(width - column) // columns), -(-(height - row) // rows)
        if across > 0:
            expected += max(down, 0) * (1 + (across * bits + 7) // 8)  # a byte names the filter of the row
    found, position, stream = 0, 8, zlib.decompressobj()
    while position + 8 <= len(png) and found < expected:
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        pending = png[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        while pending and found < expected:
            found += len(stream.decompress(pending, 1 << 20))
            pending = stream.unconsumed_tail
        position += 12 + length
    return found + len(stream.flush()) >= expected


def largest_of_16_bits(record: dict[str, Any] | None) -> int | None:
    """The largest value of a grey image of 16 bits; None for any other image, and for one that cannot be read."""
    try:
        content = _content(record or {"bytes": None, "path": None})
        with Image.open(io.BytesIO(content), formats=_formats()) as file:
            _refuse_what_it_says(file, content)
            return int(np.asarray(file).max()) if file.mode.startswith("I") else None
    except Exception:  # it is refused, with a sentence, where it is used
        return None


def _high_byte(image: Image.Image) -> Image.Image:
    """A 16-bit grey image as an 8-bit one; PIL's own conversion would clip everything above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are 32-bit integers outside the range of 16 bits.")
    high = np.empty(values.shape, dtype=np.uint8)
    np.right_shift(values, 8, out=high, casting="unsafe")  # in pieces, without a copy in a wider type
    return Image.fromarray(high)


def decode_map(record: dict[str, Any] | None, name: str = "a map without a path") -> np.ndarray:
    """An encoded map of classes: {"bytes", "path"} -> its values (H, W), or, if it is in colours, (H, W, 3) uint8.

    Of a picture with a palette, the values are the places in the palette. Grey pictures that are stored as colours are
    grey. Transparency is dropped.

    Raises:
        BadImageError: the map is missing, cannot be read, or is too large.
    """
    record, content = record or {"bytes": None, "path": None}, b""
    try:
        content = _content(record)
        with Image.open(io.BytesIO(content), formats=_formats()) as file:
            _refuse_what_it_says(file, content)
            if file.format in ("JPEG", "MPO"):
                raise ValueError("a JPEG changes the values of pixels: save maps as PNG.")
            file.load()
            if file.mode in ("1", "L", "P") or file.mode.startswith("I"):
                return np.asarray(file)
            if file.mode in ("LA", "La", "PA"):
                return np.asarray(file.getchannel(0))
            if file.mode not in ("RGB", "RGBA"):
                raise ValueError(f"its pixels are of mode {file.mode}, neither numbers nor colours.")
            colours = np.asarray(file)[..., :3]
            is_grey = (colours[..., 0] == colours[..., 1]).all() and (colours[..., 0] == colours[..., 2]).all()
            return colours[..., 0] if is_grey else colours
    except Exception as error:  # see open_image
        reason = _reason(error, content)
        raise BadImageError(f"{printable(record['path'] or name)} cannot be read as a map: {reason}") from error
