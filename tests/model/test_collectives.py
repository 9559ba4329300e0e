"""What ranks exchange on the CPU."""

import pytest
import torch

from model.collectives import finish, gather, rank, start_gather
from tests.ranks import run_on_ranks


def rows(dtype):
    return gather(torch.tensor([[rank() + 0.5, float("nan"), -3.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_rank_has_the_rows_of_all_in_their_order(tmp_path, dtype):
    wanted = torch.tensor([[r + 0.5, float("nan"), -3.0] for r in range(3)], dtype=dtype)
    for found in run_on_ranks(rows, dtype, world_size=3, folder=tmp_path):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def overlapping(times, at_once):
    mine = torch.full((1, 8), float(rank()))
    for _ in range(times):
        under_way = [start_gather(mine) for _ in range(at_once)]
        found = [finish(each) for each in under_way]
    return torch.stack(found)[:, :, 0]


@pytest.mark.slow
def test_many_gathers_at_once_do_no_harm(tmp_path):
    # gloo's own all-gathers end a process after some thousands of them; see collectives._gather_by_sum.
    for found in run_on_ranks(overlapping, 100, 128, folder=tmp_path):
        assert (found == torch.arange(2)).all()
