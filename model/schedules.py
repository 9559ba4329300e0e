"""Learning rate and momentum coefficient as functions of training progress.

`epoch` is fractional: epoch + iteration / iterations per epoch; both schedules move with every iteration.
"""

import math


def learning_rate(epoch: float, *, peak: float, epochs: float, warmup_epochs: float) -> float:
    """Linear ramp from 0 over warmup_epochs, then half a cosine from peak towards 0 at `epochs`.

    The very first step has learning rate 0. peak is the base rate x global batch / 256 (paper, section 4).
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * _half_cosine((epoch - warmup_epochs) / (epochs - warmup_epochs))


def momentum_coefficient(epoch: float, *, start: float, epochs: float, cosine: bool = True) -> float:
    """The m of the momentum encoder: from `start` to 1 by half a cosine, without warm-up; constant if not cosine."""
    if not cosine:
        return start
    return 1 - (1 - start) * _half_cosine(epoch / epochs)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
