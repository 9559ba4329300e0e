"""Files that go bad while a run reads them: it goes on, and every other slot of every batch is as it was to be."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dali_pipes import MOCO_V3, DatasetError
from dali_pipes.failures import tolerated
from dali_pipes.gap import Gap
from dali_pipes.reference import ReferenceViews
from tests.dali_pipes.failing import BATCH, DAMAGE, STEPS, check_slots, copied, delete, make, reader, truncate


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
    assert check_slots(batches, undisturbed[:STEPS], {victim}) == 1


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


def test_a_state_with_rows_of_another_index(index):
    state = make(index).state_dict()
    with pytest.raises(ValueError, match="are not all rows of an index of 25"):
        make(index).load_state_dict({**state, "failed": [25]})
    with pytest.raises(ValueError, match="are not all rows of an index of 25"):
        make(index).add_failed([-1])
    with pytest.raises(DatasetError, match=r"2 images that passed .* at most 1 may fail"):
        make(index, max_failed=1).load_state_dict({**state, "failed": [3, 4]})
