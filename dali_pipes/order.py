"""Which image stands where in an epoch: one global permutation, dealt to the ranks.

Identical to `torch.utils.data.DistributedSampler(seed=seed, shuffle=True, drop_last=True)` after `set_epoch(epoch)`:
rank r of W holds places r, r + W, r + 2W … So global batch s is the same set of images for any number of ranks that
share the same global batch size.
"""

import numpy as np
import torch
from numpy.typing import NDArray


def epoch_permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All `count` rows of the index in the order of one epoch: torch.randperm seeded with seed + epoch."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).numpy()


def equal_share(order: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's places of `order`, as many for every rank; the fewer than `world_size` rows left over are dropped."""
    return order[rank : len(order) // world_size * world_size : world_size]


def complete_share(order: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's places of `order`, nothing dropped: the first ranks may hold one row more than the last ones."""
    return order[rank::world_size]
