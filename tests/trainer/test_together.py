"""Work that one rank alone can fail at: all ranks learn of it, and nothing of it stays in memory."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from dali_pipes import DatasetError
from tests.ranks import run_on_ranks
from trainer.distributed import together
from trainer.signals import Stopped


def one_fails(error):
    def work():
        if dist.get_rank() == 1:
            raise error
        return dist.get_rank()

    try:
        return together(work)
    except (DatasetError, FloatingPointError, torch.OutOfMemoryError, Stopped) as met:
        dist.barrier()  # which would hang if the ranks disagreed
        return type(met).__name__, str(met)


@pytest.mark.parametrize("kind", [DatasetError, FloatingPointError, torch.OutOfMemoryError, Stopped])
def test_an_error_of_one_rank_is_that_of_all(kind, tmp_path):
    assert run_on_ranks(one_fails, kind("no room"), folder=tmp_path) == [(kind.__name__, "no room")] * 2


def test_results_are_each_ranks_own(tmp_path):
    assert run_on_ranks(together, dist.get_rank, folder=tmp_path) == [0, 1]


def test_what_a_failed_work_held_is_free_at_once():
    held = []

    def work():
        features = torch.zeros(8)
        held.append(weakref.ref(features))
        raise torch.OutOfMemoryError("no room")

    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            together(work)
        assert held[0]() is None
    finally:
        gc.enable()
