"""How far apart two sets of uint8 images are, in grey levels."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Gap:
    """How many values differ by how much: int64 (256,), so that gaps of any number of images add up."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))

    @classmethod
    def between(cls, ours: Iterable[Any], theirs: Iterable[Any]) -> "Gap":
        """Of pairs of uint8 images, arrays or Pillow's, of one shape each."""
        pairs = zip(ours, theirs, strict=True)
        return sum((cls(_differences(np.asarray(mine), np.asarray(other))) for mine, other in pairs), cls())

    def __add__(self, other: "Gap") -> "Gap":
        return Gap(self.counts + other.counts)

    @property
    def mean(self) -> float:
        """Mean absolute error."""
        return float(self.counts @ np.arange(256) / self.counts.sum())

    @property
    def most(self) -> int:
        """Largest difference."""
        return int(np.flatnonzero(self.counts).max())

    @property
    def differ(self) -> float:
        """Share of the values that differ, 0 to 1."""
        return float(self.counts[1:].sum() / self.counts.sum())

    @property
    def by_more(self) -> float:
        """Share of the values that are off by more than 1, 0 to 1."""
        return float(self.counts[2:].sum() / self.counts.sum())

    def __str__(self) -> str:
        return f"mean {self.mean:.4f}, max {self.most}, {self.differ:.3%} differ, {self.by_more:.4%} by more than 1"


def _differences(mine: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.int64]:
    if mine.shape != other.shape:
        raise ValueError(f"images of shapes {mine.shape} and {other.shape} cannot be compared")
    return np.bincount(np.abs(mine.astype(np.int16) - other).ravel(), minlength=256)
