"""Files that go bad while a run reads them: it goes on, and every other slot of every batch is as it was to be."""

import os
import re
import shutil
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipes import MOCO_V3, DatasetError, DatasetIndex, EvalLoader, ViewLoader
from dali_pipes.failures import tolerated
from dali_pipes.file_check import FileCheck
from dali_pipes.gap import Gap
from dali_pipes.order import epoch_permutation, equal_share, replace_failed
from dali_pipes.reference import ReferenceViews
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


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    for i in range(COUNT):
        (root / f"{i:02d}.jpg").write_bytes(encoded(picture(i), "JPEG"))
    return root


@pytest.fixture
def index(original, tmp_path):
    return DatasetIndex.scan(shutil.copytree(original, tmp_path / "images"))


def make(index, batch_size=BATCH, **options):
    options = {"seed": 3, "on_failed": lambda line: None, **options}
    return ViewLoader(index, batch_size=batch_size, image_size=16, num_threads=2, **options)


def copied(loader, epochs=1):
    """[(rows, views)] of whole epochs."""
    return [(batch.indices.tolist(), [view.clone() for view in batch.views]) for _ in range(epochs) for batch in loader]


@pytest.fixture(scope="module")
def undisturbed(original):
    return copied(make(DatasetIndex.scan(original)), epochs=3)


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


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_run_goes_on_and_no_other_slot_changes(index, undisturbed, damage):
    """The file is damaged after its first epoch was read, so that it was good once."""
    lines: list[str] = []
    victim = undisturbed[STEPS + 3][0][1]  # slot 1 of step 3 in epoch 1
    loader = make(index, on_failed=lines.append)
    batches = copied(loader)
    path = index.tree / index.names[victim]
    time.sleep(0.2)  # what is in flight has been read
    damage(path)
    batches += copied(loader, epochs=2)

    assert check_slots(batches, undisturbed, {victim}, first=STEPS) == 2  # once an epoch
    assert batches[STEPS + 3][0][1] == undisturbed[STEPS + 4][0][1]  # the image one global batch further
    (line,) = lines
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert loader.failed == [victim]

    # The replacement's views are its own: drawn for it in this epoch, as it is seen one batch later.
    replacement = batches[STEPS + 3][1]
    for mine, own in zip(replacement, undisturbed[STEPS + 4][1], strict=True):
        assert torch.equal(mine[1], own[1])


def test_an_index_without_the_sizes_of_files_serves_as_before(index, undisturbed):
    older = replace(index, file_sizes=np.zeros_like(index.file_sizes))
    assert check_slots(copied(make(older), epochs=3), undisturbed, failed=()) == 0


def test_a_replacement_is_what_the_reference_draws_for_it(index, undisturbed):
    victim = undisturbed[0][0][0]
    delete(index.tree / index.names[victim])
    loader = make(index)
    rows, views = copied(loader)[0]
    assert rows[0] == undisturbed[1][0][0]
    reference = ReferenceViews(index, MOCO_V3.scaled(16), seed=3)
    for mine, theirs in zip(views, reference[rows[0]][0], strict=True):
        assert Gap.between([mine[0]], [theirs]).mean < 0.05


def test_several_bad_files_also_in_one_slots_column(index, undisturbed):
    """The replacement of the first is bad, too, and the last batch of the epoch wraps to its beginning."""
    failed = {undisturbed[2][0][2], undisturbed[3][0][2], undisturbed[2][0][0], undisturbed[STEPS - 1][0][3]}
    for row in failed:
        truncate(index.tree / index.names[row])
    lines: list[str] = []
    loader = make(index, on_failed=lines.append)
    batches = copied(loader, epochs=3)
    assert check_slots(batches, undisturbed, failed) >= 10  # four an epoch, less where one of them sits out
    assert batches[2][0][2] == undisturbed[4][0][2]
    assert len(lines) == 4
    assert loader.failed == sorted(failed)


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_resume_after_a_failure_is_exact(index, undisturbed, stop):
    """From the state in the checkpoint, on another loader: the state knows what failed, or it is met again."""
    victim = undisturbed[3][0][0]
    truncate(index.tree / index.names[victim])
    loader, batches = reader(index, undisturbed, stop)
    state = loader.state_dict()
    assert state["failed"] == ([victim] if stop > 3 else [])
    rest: list[tuple] = []
    while len(batches) + len(rest) < 3 * STEPS:
        rest += copied(loader)

    lines: list[str] = []
    resumed = make(index, on_failed=lines.append)
    resumed.load_state_dict(state)
    again = copied(resumed)
    while len(batches) + len(again) < 3 * STEPS:
        again += copied(resumed)
    for (rows, views), (other_rows, other_views) in zip(again, rest, strict=True):
        assert rows == other_rows
        assert all(torch.equal(a, b) for a, b in zip(views, other_views, strict=True))
    assert len(lines) == (0 if stop > 3 else 1)


def test_broken_pipelines_are_freed(index, undisturbed):
    before = len(os.listdir("/proc/self/task"))
    for step in range(STEPS):
        truncate(index.tree / index.names[undisturbed[step][0][0]])
        delete(index.tree / index.names[undisturbed[step][0][1]])
    loader = make(index, max_failed=12)
    with pytest.raises(DatasetError, match="at a global batch of 4 none is left"):  # of a whole column
        copied(loader)
    loader.close()
    assert len(os.listdir("/proc/self/task")) <= before


def test_a_bad_file_that_is_read_ahead_leaves_the_batch_before_it_as_it_is(index, undisturbed):
    victim = undisturbed[2][0][0]
    truncate(index.tree / index.names[victim])
    loader = make(index)
    batches = []
    for batch in loader:
        batches.append((batch.indices.tolist(), [view.clone() for view in batch.views]))
        time.sleep(0.1)  # DALI meets the next bad file while this batch is in use
    check_slots(batches, undisturbed[:STEPS], {victim})


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_without_a_word(index, undisturbed, world_size):
    """Each rank knows of its own failures only, and the global batches are those of one process."""
    failed = {undisturbed[1][0][0], undisturbed[1][0][1], undisturbed[2][0][1], undisturbed[4][0][3]}
    for row in failed:
        delete(index.tree / index.names[row])
    alone = copied(make(index), epochs=2)
    local = BATCH // world_size
    ranks = [copied(make(index, local, rank=rank, world_size=world_size), epochs=2) for rank in range(world_size)]
    for step, (rows, views) in enumerate(alone):
        for slot in range(BATCH):
            theirs_rows, theirs_views = ranks[slot % world_size][step]
            assert theirs_rows[slot // world_size] == rows[slot]
            for mine, theirs in zip(views, theirs_views, strict=True):
                assert torch.equal(mine[slot], theirs[slot // world_size])


def test_what_other_ranks_met_is_replaced_before_it_is_read(index, undisturbed):
    victim = undisturbed[2][0][1]
    loader = make(index, on_failed=lambda line: pytest.fail(line))
    batches = []
    for batch in loader:
        batches.append((batch.indices.tolist(), [view.clone() for view in batch.views]))
        loader.add_failed([victim])  # its batch is in flight
    assert check_slots(batches, undisturbed[:STEPS], {victim}) == 1
    assert loader.state_dict()["failed"] == [victim]


def test_too_many_stop_the_run_with_one_line(index, undisturbed):
    for row in undisturbed[1][0][:3]:
        truncate(index.tree / index.names[row])
    loader = make(index, max_failed=2)
    with pytest.raises(DatasetError, match=r"3 images that passed .* at most 2 may fail; the last is ") as error:
        copied(loader)
    assert "\n" not in str(error.value)
    assert error.value.__context__ is None
    with pytest.raises(DatasetError, match="at most 2 may fail; one of them is "):
        make(index, max_failed=2).add_failed([1, 2, 3])
    with pytest.raises(DatasetError, match="at most 0 may"):
        copied(make(index, max_failed=0))


def test_how_many_are_tolerated():
    assert [tolerated(count) for count in (25, 10_000, 1_281_167)] == [10, 10, 1281]


def test_no_image_left_to_take_the_place(original):
    order = np.arange(8)
    with pytest.raises(DatasetError, match=r"2 of 8 images cannot be used, and at a global batch of 4 none is left"):
        replace_failed(order, {1, 5}, 4)


def test_a_disk_that_stumbles_is_read_once_more(index, undisturbed, monkeypatch):
    """The file is whole again when it is looked at: nothing explains the failure, so nothing is set aside."""
    path = index.tree / index.names[4]
    whole = path.read_bytes()
    truncate(path)
    monkeypatch.setattr("dali_pipes.failures._look", lambda index, row: path.write_bytes(whole) and FileCheck())
    loader = make(index)
    assert check_slots(copied(loader), undisturbed[:STEPS], failed=set()) == 0
    assert loader.failed == []


@pytest.mark.parametrize("train", [True, False])
def test_what_only_dali_cannot_read_is_found_and_named(original, tmp_path, train):
    """From the start: it passes the scan, and Pillow has nothing against it."""
    shutil.copytree(original, tmp_path / "images")
    sixteen_bits(tmp_path / "images" / "05.jpg")
    index = DatasetIndex.scan(tmp_path / "images")
    lines: list[str] = []
    assert len(index) == COUNT
    if train:
        copied(make(index, on_failed=lines.append))
    else:
        rows = [batch.indices for batch in EvalLoader(index, 4, resize=16, crop=16, on_failed=lines.append)]
        assert torch.cat(rows).tolist() == [row for row in range(COUNT) if row != 5]
    (line,) = lines
    assert line.startswith(f"{tmp_path / 'images' / '05.jpg'}: the decoder cannot read it, although Pillow can")


def test_trouble_of_dalis_own_is_raised(index, monkeypatch):
    truncate(index.tree / index.names[4])
    monkeypatch.setattr("dali_pipes.failures._look", lambda index, row: FileCheck())
    monkeypatch.setattr("dali_pipes.failures._undecoded", lambda index, rows, stream: {})
    with pytest.raises(DatasetError, match="DALI failed on a batch of readable files"):
        copied(make(index))


def test_a_decoder_that_fails_on_everything_blames_no_image(index, monkeypatch):
    """As after an error of the GPU, which every later call repeats."""
    loader = make(index, on_failed=lambda line: pytest.fail(line))
    batches = iter(loader)
    next(batches)

    def broken(*_, **__):
        raise RuntimeError("CUDA runtime API error cudaErrorIllegalAddress (700)")

    monkeypatch.setattr(type(loader._stream._pipeline), "outputs", broken)
    monkeypatch.setattr("dali_pipes.stream.decode", broken)
    with pytest.raises(DatasetError, match=r"DALI failed on .* cudaErrorIllegalAddress"):
        next(batches)
    assert loader.failed == []


def test_a_disk_that_was_away_for_a_moment_costs_no_image(index, undisturbed, monkeypatch):
    away = index.tree.with_name("away")
    pauses = []

    def back_at_the_second_look(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            away.rename(index.tree)

    monkeypatch.setattr("dali_pipes.failures.time.sleep", back_at_the_second_look)
    loader, batches = reader(index, undisturbed, STEPS - 1)
    index.tree.rename(away)
    loader.set_epoch(1)
    batches += copied(loader)
    assert check_slots(batches[STEPS - 1 :], undisturbed[STEPS : 2 * STEPS], failed=set()) == 0
    assert len(pauses) == 2
    assert loader.failed == []


def test_a_disk_that_stays_away_ends_the_run_without_blame(index, undisturbed, monkeypatch):
    monkeypatch.setattr("dali_pipes.failures.time.sleep", lambda seconds: None)
    loader, _ = reader(index, undisturbed, 2)
    index.tree.rename(index.tree.with_name("away"))
    with pytest.raises(DatasetError, match=r"none of \d+ files can be read, the first .*No such file.*their disk"):
        copied(loader)
    assert loader.failed == []


@pytest.mark.parametrize("words", ["Can't allocate 4096 bytes on device 0.", "cudaErrorMemoryAllocation (2)"])
def test_too_little_memory_is_no_trouble_of_the_images(words, index, monkeypatch):
    """The words are those of libdali_core and of what it passes on; a CPU never runs into them."""
    loader = make(index)
    batches = iter(loader)
    next(batches)

    def outputs(pipeline):
        raise RuntimeError(f"Critical error in pipeline:\n{words}")

    monkeypatch.setattr(type(loader._stream._pipeline), "outputs", outputs)
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(words)):
        next(batches)


def test_too_little_memory_to_build_the_pipeline(index, monkeypatch):
    def build(*args, **options):
        raise RuntimeError("Can't allocate 4096 bytes on device 0.")

    monkeypatch.setattr("dali_pipes.stream.build_pipeline", build)
    with pytest.raises(torch.OutOfMemoryError, match="Can't allocate 4096 bytes on device 0"):
        next(iter(make(index)))


def test_a_state_with_rows_of_another_index(index):
    state = make(index).state_dict()
    with pytest.raises(ValueError, match="are not all rows of an index of 25"):
        make(index).load_state_dict({**state, "failed": [25]})
    with pytest.raises(ValueError, match="are not all rows of an index of 25"):
        make(index).add_failed([-1])
    with pytest.raises(DatasetError, match=r"2 images that passed .* at most 1 may fail"):
        make(index, max_failed=1).load_state_dict({**state, "failed": [3, 4]})


@pytest.mark.parametrize("count", [40, 47])
def test_the_rule_over_many_random_failures(count):
    """No image twice in a global batch, no other slot moved, the nearest good image of the column; for any ranks."""
    rng = np.random.default_rng(count)
    for trial in range(50):
        order = epoch_permutation(count, 1, trial)
        failed = set(rng.choice(count, rng.integers(1, 10), replace=False).tolist())
        try:
            replaced = replace_failed(order, failed, 8)
        except DatasetError:
            continue
        for place, (old, new) in enumerate(zip(order.tolist(), replaced.tolist(), strict=True)):
            steps = [old] if old not in failed else []
            further = list(range(place + 8, count, 8)) + list(range(place % 8, place, 8))
            assert new == next(image for image in steps + order[further].tolist() if image not in failed)
        for step in range(count // 8):
            assert len(set(replaced[step * 8 : step * 8 + 8].tolist())) == 8
        # Learning of the failures one by one, in any order, and half of them only on another rank, ends at the same.
        for rank in range(2):
            mine = equal_share(replaced, rank, 2)[: count // 8 * 4]
            known: set[int] = set()
            while met := set(equal_share(replace_failed(order, known, 8), rank, 2)[: count // 8 * 4].tolist()) & failed:
                known.add(rng.choice(sorted(met)).item())
            assert equal_share(replace_failed(order, known, 8), rank, 2)[: count // 8 * 4].tolist() == mine.tolist()
