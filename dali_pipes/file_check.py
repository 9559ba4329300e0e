"""One look at an image file: its size, or why it cannot be used."""

import os
import stat
from dataclasses import dataclass
from typing import BinaryIO, Literal

from PIL import Image

Level = Literal["header", "full"]

# what DALI decodes, by Pillow's name of the type; MPO is a camera's JPEG with a second picture behind it
_TYPES = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "JPEG2000")
MOST_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a gigabyte as RGB
_ORIENTATION = 0x0112  # tag of TIFF and EXIF
_TAIL = 4096  # bytes in which a JPEG's end marker is looked for; what cameras append is usually less


@dataclass(frozen=True)
class FileCheck:
    """What one look at a file found: its size, or the reason why it cannot be used."""

    width: int = 0
    height: int = 0
    reason: str = ""
    of_disk: bool = False  # the reason is none of what is in the file: its rights, its disk


def check_file(path: str, level: Level = "header") -> FileCheck:
    """Whether an image file can be used; never raises for what is wrong with the file."""
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return FileCheck(reason="not a file")
            size = status.st_size
            if size == 0:
                return FileCheck(reason="empty file")
            jpeg = file.read(2) == b"\xff\xd8"
            file.seek(0)
            with Image.open(file) as image:
                width, height = image.size
                if image.format not in _TYPES:
                    return FileCheck(reason=f"{image.format} is not a type that the decoder reads")
                if reason := _decoded_differently(image, file):
                    return FileCheck(reason=reason)
                if width * height > MOST_PIXELS:
                    return FileCheck(reason=f"{width} x {height} is over the limit of {MOST_PIXELS} pixels")
                if level == "full" or not _ends(file, size, image.format):
                    image.load()
    except Image.UnidentifiedImageError:
        kind = "a JPEG that is damaged or of an unsupported kind, such as 12-bit" if jpeg else "not an image"
        return FileCheck(reason=kind)
    except Image.DecompressionBombError as error:
        return FileCheck(reason=str(error))
    except Exception as error:  # on damaged files Pillow raises many types
        return FileCheck(reason=str(error) or type(error).__name__, of_disk=getattr(error, "errno", None) is not None)
    return FileCheck(width, height)


def _at_once(path: str, flags: int) -> int:
    """Opens without waiting for somebody to write, as at a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _decoded_differently(image: Image.Image, file: BinaryIO) -> str:
    """What makes DALI read an image that Pillow reads with other pixels, or not at all; nothing for most."""
    if image.format == "TIFF":
        if image.mode not in ("L", "RGB", "RGBA", "CMYK"):
            return f"a TIFF of mode {image.mode}, which the decoder reads otherwise or not at all"
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return "a TIFF that is to be turned, which the decoder does not do"
    tiles = getattr(image, "tile", None)
    if image.format == "PPM" and tiles and tiles[0][0] != "raw":
        return "a PPM or PGM as text or of an odd largest value, which the decoder reads otherwise"
    if image.format == "WEBP" and _padded_before_exif(file):
        return "a WebP with EXIF behind a part of odd length, which the decoder cannot read; save it without EXIF"
    return ""


def _padded_before_exif(file: BinaryIO) -> bool:
    """Whether a WebP's EXIF stands behind a chunk of odd length: nvImageCodec 0.9 does not skip the byte after that."""
    place = file.tell()
    file.seek(12)
    chunks = []
    while len(head := file.read(8)) == 8 and head[:4] != b"EXIF":
        chunks.append(int.from_bytes(head[4:], "little"))
        file.seek(chunks[-1] + chunks[-1] % 2, os.SEEK_CUR)
    file.seek(place)
    return head[:4] == b"EXIF" and any(size % 2 for size in chunks)


def _ends(file: BinaryIO, size: int, kind: str) -> bool:
    """Whether the file has its type's end mark where it should be; without one, only decoding tells."""
    marks = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
    if kind not in marks:
        return kind == "WEBP"  # whose length Pillow has compared at opening
    place = file.tell()
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    file.seek(place)
    return marks[kind] in tail
