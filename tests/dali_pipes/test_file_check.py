"""One look at each image file: what is set aside, with the reason, and what is kept."""

import os
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.graph import decode
from tests.dali_pipes.odd_files import BAD, GOOD, encoded, picture, write_odd_files


@pytest.mark.parametrize("level", ["header", "full"])
def test_odd_files(tmp_path, pictures, level):
    write_odd_files(tmp_path / "odd", pictures[0])
    index = DatasetIndex.scan(tmp_path, level=level)
    assert [name.split("/")[1] for name in index.names] == sorted(GOOD)
    reasons = {path.rsplit("/")[-1]: reason for path, reason in index.rejected}
    assert reasons.keys() == BAD.keys()
    for name, expected in BAD.items():
        assert expected in reasons[name], (name, reasons[name])
    at = index.names.index("odd/exif_rotated.jpg")
    assert (index.widths[at], index.heights[at]) == pictures[0].size


def test_full_level_finds_damage_inside(tmp_path, pictures):
    png = bytearray(encoded(pictures[0], "PNG"))
    png[len(png) // 2] ^= 0xFF
    (tmp_path / "damaged.png").write_bytes(png)
    (tmp_path / "good.jpg").write_bytes(encoded(pictures[0], "JPEG"))
    assert len(DatasetIndex.scan(tmp_path)) == 2
    assert DatasetIndex.scan(tmp_path, level="full").names == ["good.jpg"]


def test_whatever_pillow_raises_is_of_one_file(tmp_path):
    tiff = bytearray(encoded(picture(0), "TIFF"))
    offsets = tiff.index(struct.pack("<H", 273), struct.unpack_from("<I", tiff, 4)[0])
    struct.pack_into("<H", tiff, offsets + 2, 2)  # where the pixels are is said in letters: a TypeError
    (tmp_path / "letters.tif").write_bytes(tiff)
    start = b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    (tmp_path / "huge.jpg").write_bytes(start + struct.pack(">I4sQ", 1, b"jp2h", 2**62) + b"ihdr")  # a MemoryError
    (tmp_path / "good.png").write_bytes(encoded(picture(0), "PNG"))
    index = DatasetIndex.scan(tmp_path)
    assert index.names == ["good.png"]
    assert {Path(path).name for path, _ in index.rejected} == {"letters.tif", "huge.jpg"}
    assert all(reason for _, reason in index.rejected)


def test_unreadable_and_missing_files_are_set_aside(tree):
    (tree / "a" / "dangling.jpg").symlink_to(tree / "nowhere.jpg")
    (tree / "flat").mkdir()
    (tree / "flat" / "good.jpg").write_bytes(encoded(picture(0), "JPEG"))
    (tree / "flat" / "dangling.jpg").symlink_to(tree / "nowhere.jpg")
    (tree / "loose.jpg").unlink()
    for folder, count in ((tree, 2), (tree / "flat", 1)):
        rejected = DatasetIndex.scan(folder).rejected
        assert len(rejected) == count
        for path, reason in rejected:
            assert path.endswith("dangling.jpg")
            assert "No such file" in reason


def test_too_many_pixels(tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(picture(0), "PNG"))
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 9_000)).save(tmp_path / "larger.png")
    index = DatasetIndex.scan(tmp_path)
    assert index.names == ["good.png"]
    assert "10000 x 9000 is over the limit" in index.rejected[0][1]
    assert "exceeds limit" in index.rejected[1][1]


@pytest.mark.parametrize("options", [{"lossless": True}, {"icc_profile": b"x" * 301}, {"icc_profile": b"x" * 302}, {}])
def test_a_webp_with_exif_is_read_or_set_aside(options, tmp_path):
    exif = Image.Exif()
    exif[271] = "a camera"
    for seed in range(12):
        (tmp_path / f"{seed:02d}.webp").write_bytes(encoded(picture(seed), "WEBP", exif=exif, **options))
    readable = []
    for path in sorted(tmp_path.glob("*.webp")):
        with suppress(RuntimeError):
            decode([str(path)])
            readable.append(path.name)
    if not readable:
        with pytest.raises(DatasetError, match="a WebP with EXIF behind a part of odd length"):
            DatasetIndex.scan(tmp_path)
        return
    index = DatasetIndex.scan(tmp_path)
    assert index.names == readable
    assert all("a WebP with EXIF behind a part of odd length" in reason for _, reason in index.rejected)


def test_a_pipe_is_not_waited_for(tree):
    os.mkfifo(tree / "a" / "pipe.jpg")
    assert (str(tree / "a" / "pipe.jpg"), "not a file") in DatasetIndex.scan(tree).rejected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_a_claimed_size_takes_no_memory(kind, tmp_path):
    """A header of the largest size that its type can claim, scanned by a process that may hardly grow."""
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb" / "large.img.png").write_bytes(bomb(kind))
    code = """
import resource, sys
from dali_pipes import DatasetError, DatasetIndex
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    DatasetIndex.scan(sys.argv[1], level="full")
except DatasetError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bomb"], capture_output=True, text=True, check=True)
    message, grown = done.stdout.splitlines()
    assert "none of 1 images can be read" in message
    assert int(grown) < 64  # MiB; the picture would take 200 and more


def bomb(kind):
    """A small picture whose header claims 65,000 x 65,000 pixels, or what the type can at most."""
    content = bytearray(encoded(picture(0, 64, 48), kind))
    if kind == "PNG":
        content[16:24] = struct.pack(">II", 65_000, 65_000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "JPEG":
        at = content.index(b"\xff\xc0")
        content[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    elif kind == "BMP":
        content[18:26] = struct.pack("<ii", 65_000, 65_000)
    elif kind == "PPM":
        content = content.replace(b"48 64", b"65000 65000", 1)
    elif kind == "WEBP":
        at = content.index(b"VP8 ")
        frame = content[at:]
        frame[14:18] = struct.pack("<HH", 16_383, 16_383)
        content = bytearray(b"RIFF" + struct.pack("<I", 4 + len(frame)) + b"WEBP" + frame)
    elif kind == "TIFF":
        (count,) = struct.unpack_from("<H", content, start := struct.unpack_from("<I", content, 4)[0])
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from("<H", content, entry)[0] in (256, 257):
                struct.pack_into("<HHII", content, entry, struct.unpack_from("<H", content, entry)[0], 4, 1, 65_000)
    else:
        at = content.index(b"ihdr")
        content[at + 4 : at + 12] = struct.pack(">II", 65_000, 65_000)
        at = content.index(b"\xff\x51")
        content[at + 6 : at + 14] = struct.pack(">II", 65_000, 65_000)
    return bytes(content)
