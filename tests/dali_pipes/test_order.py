import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from dali_pipes import DatasetError
from dali_pipes.order import complete_share, epoch_permutation, equal_share, replace_failed


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


def test_no_image_left_to_take_the_place():
    order = np.arange(8)
    with pytest.raises(DatasetError, match=r"2 of 8 images cannot be used, and at a global batch of 4 none is left"):
        replace_failed(order, {1, 5}, 4)


@pytest.mark.parametrize("count", [40, 47])
def test_the_rule_over_many_random_failures(count):
    """No image twice in a global batch, no other slot moved, the nearest good image of the column; for any ranks."""
    rng, looked_at = np.random.default_rng(count), 0
    for trial in range(50):
        order = epoch_permutation(count, 1, trial)
        failed = set(rng.choice(count, rng.integers(1, 10), replace=False).tolist())
        try:
            replaced = replace_failed(order, failed, 8)
        except DatasetError:
            continue
        looked_at += 1
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
    assert looked_at > 40
