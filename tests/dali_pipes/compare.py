"""How far apart two sets of uint8 images are, in grey levels."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gap:
    mean: float
    most: int
    differ: float  # share of the values
    by_more: float  # share of the values that are off by more than 1

    @classmethod
    def between(cls, ours, theirs):
        pairs = zip(ours, theirs, strict=True)
        off = np.concatenate([np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).ravel() for a, b in pairs])
        return cls(off.mean(), off.max(), (off > 0).mean(), (off > 1).mean())
