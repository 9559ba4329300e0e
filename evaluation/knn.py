"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018, section 3.4; as in DINO's protocol).

Takes features and loaders, never a run.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SLICE = 2**26  # similarities, or votes, that are computed at a time: 256 MiB


class Labelled(Protocol):
    """A batch: images (N, 3, H, W), class labels and dataset rows int64 (N,)."""

    @property
    def images(self) -> Tensor: ...  # noqa: D102
    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def indices(self) -> Tensor: ...  # noqa: D102


@torch.no_grad()
def extract(features: Callable[[Tensor], Tensor], batches: Iterable[Labelled]) -> tuple[Tensor, Tensor]:
    """Normalised features of this rank's share of a dataset.

    Args:
        features: maps images (N, 3, H, W) to features (N, F).
        batches: the share; those of the ranks are disjoint and may differ in length.

    Returns:
        Features (S, F) float32 of unit length, and index and label of each, int64 (S, 2), on the device of the images.
    """
    rows: list[Tensor] = []
    keys: list[Tensor] = []
    for batch in batches:
        found = F.normalize(features(batch.images).float(), dim=1)
        rows.append(found)
        columns = [column.to(found.device, non_blocking=True) for column in (batch.indices, batch.labels)]
        keys.append(torch.stack(columns, dim=1))
    return torch.cat(rows), torch.cat(keys)


def gather(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """What `extract` gave on all ranks: features (M, F) and labels int64 (M,) of the whole dataset.

    They are in the order of the dataset's indices and the same on every rank; every rank must call it.
    """
    values, table = _gather(values), _gather(table)
    order = table[:, 0].argsort()
    return values[order], table[order, 1]


@torch.no_grad()
def accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of queries (0 to 1) whose class wins the vote of its k most similar images.

    Similarity is the cosine s; a neighbour votes for its class with weight exp(s / temperature).

    Args:
        bank: (M, F), unit length, with class labels int64 (M,).
        queries: (Q, F), unit length, with class labels int64 (Q,).
        k: neighbours, at most M are taken.
        temperature: of the vote's weights.

    Raises:
        FloatingPointError: a feature is not finite; in a bank it would be everybody's nearest neighbour.
    """
    # By sums of rows: isfinite of the whole would take as much memory as the bank again.
    odd = sum(int((~rows.sum(1).isfinite()).sum()) for rows in (bank, queries))
    if odd:
        raise FloatingPointError(f"features of {odd} of {len(bank) + len(queries)} images are not finite")
    classes = int(torch.maximum(bank_labels.max(), labels.max())) + 1
    right = 0
    rows = max(1, SLICE // max(len(bank), classes))
    for start in range(0, len(queries), rows):
        similarity, nearest = (queries[start : start + rows] @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(similarity), classes, device=bank.device)
        # Less the largest one, which changes no vote: at a temperature of 0.01 the weights alone overflow float32.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.scatter_add_(1, bank_labels[nearest], weights)
        right += int((votes.argmax(1) == labels[start : start + rows]).sum())
    return right / len(queries)


def _gather(mine: Tensor) -> Tensor:
    """Concatenate tensors (n_r, C) of all ranks, whose n_r may differ."""
    if not dist.is_initialized():
        return mine
    sizes = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=mine.device))
    longest = int(torch.stack(sizes).max())
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
