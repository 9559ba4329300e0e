"""Files that go bad while a loader reads them, and what its batches are then compared with."""

import struct

import torch
from PIL import Image

from dali_pipes import ViewLoader
from dali_pipes.order import epoch_permutation
from tests.dali_pipes.odd_files import encoded, picture

COUNT, BATCH, STEPS = 25, 4, 6  # one image is left over


def truncate(path):
    path.write_bytes(path.read_bytes()[:400])


def halve(path):
    """Its header is whole, and tells the size that the scan saw."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(len(path.read_bytes())))


def shrink(path):
    path.write_bytes(encoded(picture(99, 12, 16), "JPEG"))


def scramble(path):
    """Other bytes amid the scan of a JPEG, of the same number; none begins a marker."""
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + 300] = bytes(37 * i % 255 for i in range(300))
    path.write_bytes(content)


def recompress(path):
    """The same picture and whole, so that no decoder minds: only the index knows that the file is shorter."""
    with Image.open(path) as image:
        path.write_bytes(encoded(image.convert("RGB"), "JPEG", quality=10))


def enlarge(path):
    """To a larger picture, of which a crop would be the top left corner."""
    path.write_bytes(encoded(picture(99, 480, 640), "JPEG"))


def append(path):
    """What is decoded stays the same; but who can tell?"""
    path.write_bytes(path.read_bytes() + b"more")


def sixteen_bits(path):
    """A kind of BMP that Pillow reads and DALI does not, of the same size in pixels."""
    with Image.open(path) as image:
        width, height = image.size
    pixels = bytes(height * (2 * width + 2 * width % 4))
    header = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    path.write_bytes(
        header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, len(pixels), 0, 0, 0, 0) + pixels
    )


DAMAGE = [truncate, halve, delete, empty, zero, shrink, recompress, enlarge, append, sixteen_bits]


def make(index, batch_size=BATCH, **options):
    options = {"seed": 3, "on_failed": lambda line: None, **options}
    return ViewLoader(index, batch_size=batch_size, image_size=16, num_threads=2, **options)


def copied(loader, epochs=1):
    """[(rows, views)] of whole epochs."""
    return [(batch.indices.tolist(), [view.clone() for view in batch.views]) for _ in range(epochs) for batch in loader]


def reader(index, undisturbed, step):
    """A loader that has read up to global batch `step`, with two more in flight; and the batches it gave."""
    loader = make(index)
    batches = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            batches.append((batch.indices.tolist(), [view.clone() for view in batch.views]))
            if len(batches) == step:
                return loader, batches
    raise AssertionError


def expected(epoch, step, slot, failed):
    """One global batch further in the epoch's order, then two, …, wrapping: the first that has not failed."""
    column = epoch_permutation(COUNT, 3, epoch)[slot::BATCH].tolist()
    return next(row for row in column[step + 1 :] + column[:step] if row not in failed)


def check_slots(batches, undisturbed, failed, first=0):
    """Every slot is the undisturbed run's, but those of `failed`, from step `first` on, hold the rule's image."""
    assert len(batches) == len(undisturbed)
    replaced = 0
    for step, ((rows, views), (old_rows, old_views)) in enumerate(zip(batches, undisturbed, strict=True)):
        assert len(set(rows)) == len(rows)
        for slot, old in enumerate(old_rows):
            if old in failed and step >= first:
                replaced += 1
                assert rows[slot] == expected(step // STEPS, step % STEPS, slot, failed)
            else:
                assert rows[slot] == old
                assert all(torch.equal(a[slot], b[slot]) for a, b in zip(views, old_views, strict=True))
    return replaced
