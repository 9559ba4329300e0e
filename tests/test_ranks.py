"""The harness itself: what it returns, and that no failure goes unnoticed."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks


def add(value):
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return total.item(), int(os.environ["RANK"]), dist.get_world_size()


def fail_on_one():
    if dist.get_rank() == 1:
        raise ZeroDivisionError("only rank 1")
    dist.barrier()


def die_on_one():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hang_on_one():
    if dist.get_rank() == 1:
        time.sleep(600)


def test_results_come_in_rank_order(tmp_path):
    assert run_on_ranks(add, 10, world_size=3, folder=tmp_path) == [(33, 0, 3), (33, 1, 3), (33, 2, 3)]


def test_an_error_of_one_rank_is_raised_here(tmp_path):
    with pytest.raises(RuntimeError, match="ZeroDivisionError: only rank 1"):
        run_on_ranks(fail_on_one, folder=tmp_path)


def test_a_dead_rank_is_noticed(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit codes .*3"):
        run_on_ranks(die_on_one, folder=tmp_path)


def test_ranks_that_hang_are_ended(tmp_path):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="still running"):
        run_on_ranks(hang_on_one, folder=tmp_path, timeout=8)
    assert time.monotonic() - start < 60
