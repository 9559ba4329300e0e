"""One of each odd file that real datasets contain, made from a photograph."""

import io

import numpy as np
from PIL import Image

GOOD = [
    "progressive.jpg",
    "gray.jpg",
    "cmyk.jpg",
    "exif_rotated.jpg",
    "png_by_content.JPEG",
    "palette.png",
    "alpha.png",
    "trailing.jpg",
    "one_pixel.jpg",
    "one_pixel.png",
    "thin.jpg",
    "picture.bmp",
    "picture.webp",
    "picture.tif",
    "picture.ppm",
    "picture.pgm",
]
BAD = {
    "cut_half.jpg": "truncated",
    "cut_at_99_percent.jpg": "truncated",
    "no_end_marker.jpg": "truncated",
    "cut.png": "truncated",
    "empty.jpg": "empty file",
    "text.jpg": "not an image",
    "gif.jpg": "GIF is not a type",
    "twelve_bit.jpg": "12-bit",
    "header_only.jpg": "truncated",
    "turned.tif": "a TIFF that is to be turned",
    "float.tif": "a TIFF of mode F",
    "dark.ppm": "of an odd largest value",
    "cut.bmp": "truncated",
    "cut.ppm": "truncated",
    "cut.tif": "truncated",
}


def write_odd_files(folder, photo):
    """All of GOOD and BAD into `folder`, from an RGB Pillow image."""
    folder.mkdir(parents=True, exist_ok=True)
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixel = photo.resize((1, 1))
    raw = {"bmp": encoded(photo, "BMP"), "ppm": encoded(photo, "PPM"), "tif": encoded(photo, "TIFF")}
    twelve_bit = bytearray(jpeg)
    twelve_bit[jpeg.index(b"\xff\xc0") + 4] = 12
    files = {
        "progressive.jpg": encoded(photo, "JPEG", progressive=True),
        "gray.jpg": encoded(photo.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "exif_rotated.jpg": encoded(photo, "JPEG", exif=exif),
        "png_by_content.JPEG": png,
        "palette.png": encoded(photo.convert("P"), "PNG"),
        "alpha.png": encoded(photo.convert("RGBA"), "PNG"),
        "trailing.jpg": jpeg + b"\0" * 10_000,
        "one_pixel.jpg": encoded(pixel, "JPEG"),
        "one_pixel.png": encoded(pixel, "PNG"),
        "thin.jpg": encoded(photo.resize((1, 375)), "JPEG"),
        "picture.bmp": encoded(photo, "BMP"),
        "picture.webp": encoded(photo, "WEBP", lossless=True),
        "picture.tif": encoded(photo, "TIFF"),
        "picture.ppm": encoded(photo, "PPM"),
        "picture.pgm": encoded(photo.convert("L"), "PPM"),
        "cut_half.jpg": jpeg[: len(jpeg) // 2],
        "cut_at_99_percent.jpg": jpeg[: len(jpeg) * 99 // 100],
        "no_end_marker.jpg": jpeg[:-2],
        "cut.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "text.jpg": b"Not a picture at all.\n" * 100,
        "gif.jpg": encoded(photo.convert("P"), "GIF"),
        "twelve_bit.jpg": bytes(twelve_bit),
        "header_only.jpg": jpeg[: jpeg.index(b"\xff\xda") + 14],
        "turned.tif": encoded(photo, "TIFF", exif=exif),
        "float.tif": encoded(photo.convert("F"), "TIFF"),
        "dark.ppm": b"P6 4 4 100 " + bytes(range(48)),
        **{f"cut.{ending}": whole[: len(whole) * 2 // 3] for ending, whole in raw.items()},
    }
    assert files.keys() == {*GOOD, *BAD}
    for name, content in files.items():
        (folder / name).write_bytes(content)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **{"quality": 90, **options})
    return buffer.getvalue()


def picture(seed, height=48, width=64):
    """A small image that compresses as photographs do, and is like no other."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def broken_inside(seed):
    """A PNG that nothing can decode, with its damage where a scan does not look."""
    content = bytearray(encoded(picture(seed), "PNG"))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)
