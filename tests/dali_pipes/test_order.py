import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from dali_pipes.order import complete_share, epoch_permutation, equal_share


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("count", [40, 1003])
def test_shares_are_those_of_the_distributed_sampler(count, world_size):
    dataset = TensorDataset(torch.zeros(count))
    for epoch in (0, 1, 7):
        order = epoch_permutation(count, seed=5, epoch=epoch)
        for rank in range(world_size):
            sampler: DistributedSampler = DistributedSampler(dataset, world_size, rank, seed=5, drop_last=True)
            sampler.set_epoch(epoch)
            assert equal_share(order, rank, world_size).tolist() == list(sampler)


def test_a_global_batch_is_the_same_set_for_any_number_of_ranks():
    order = epoch_permutation(1003, seed=0, epoch=2)

    def global_batches(world_size):
        local = 24 // world_size
        shares = [equal_share(order, rank, world_size) for rank in range(world_size)]
        steps = 1003 // 24
        return [set(np.concatenate([share[s * local : (s + 1) * local] for share in shares])) for s in range(steps)]

    alone = global_batches(1)
    assert global_batches(2) == alone
    assert global_batches(8) == alone
    assert all(len(batch) == 24 for batch in alone)


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_complete_shares_are_disjoint_and_miss_nothing(world_size):
    shares = [complete_share(np.arange(1003), rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares)) == list(range(1003))
