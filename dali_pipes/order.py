"""Which image stands where in an epoch: one global permutation, dealt to the ranks.

Identical to `torch.utils.data.DistributedSampler(seed=seed, shuffle=True, drop_last=True)` after `set_epoch(epoch)`:
rank r of W holds places r, r + W, r + 2W … So global batch s is the same set of images for any number of ranks that
share the same global batch size.
"""

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from dali_pipes.index import DatasetError


def epoch_permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All `count` rows of the index in the order of one epoch: torch.randperm seeded with seed + epoch."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).numpy()


def replace_failed(order: NDArray[np.int64], failed: Collection[int], global_batch: int) -> NDArray[np.int64]:
    """The order with each failed image's place taken by the image one global batch further; or two, …, wrapping.

    Slot q of every global batch takes its images from the places q, q + global_batch, q + 2 global_batch … and from no
    others. These columns of a permutation are disjoint: so no image stands twice in a global batch however many have
    failed, and no other slot moves. A slot belongs to one rank for the whole epoch, so a rank need not know what failed
    on the others to keep clear of their images.

    A replacement that is itself failed is skipped, also one that is found out only later: the rows of a place change
    only if the image in it fails, whatever the order in which failures become known.

    Raises:
        DatasetError: all images of a column have failed.
    """
    if not failed:
        return order
    bad = np.isin(order, np.fromiter(failed, np.int64, len(failed)))
    replaced = order.copy()
    for place in np.flatnonzero(bad).tolist():
        column = np.arange(place % global_batch, len(order), global_batch)
        column = np.roll(column, -(place // global_batch))  # from this place on, wrapping
        good = column[~bad[column]]
        if not len(good):
            raise DatasetError(
                f"{len(failed)} of {len(order)} images cannot be used, and at a global batch of "
                f"{global_batch} none is left to take the place of one of them; mend them, or use a smaller batch"
            )
        replaced[place] = order[good[0]]
    return replaced


def equal_share(order: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's places of `order`, as many for every rank; the fewer than `world_size` rows left over are dropped."""
    return order[rank : len(order) // world_size * world_size : world_size]


def complete_share(order: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's places of `order`, nothing dropped: the first ranks may hold one row more than the last ones."""
    return order[rank::world_size]
