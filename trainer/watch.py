"""What a run is told of its steps, N at a time: kept on the device until it is read, bad steps named, collapse said."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.collapse import Spread, spread
from trainer.distributed import gathered, max_over_ranks
from trainer.objective import Outputs

FINE, OVERFLOW, BAD = 0, 1, 2
# A skipped step leaves all as it was. If so many in a row are bad, it is the weights, and the next will be bad, too.
HOPELESS = 100


@dataclass(frozen=True)
class BadStep:
    """A rank's share of a step gone bad.

    indices: the images whose features were not finite; all of the share where none stood out on any rank.
    """

    step: int
    rank: int
    indices: list[int]

    def __str__(self) -> str:
        more = " …" if len(self.indices) > 8 else ""
        images = f" (images {' '.join(map(str, self.indices[:8]))}{more})" if self.indices else ""
        return f"step {self.step} on rank {self.rank}{images}"


@dataclass(frozen=True)
class Reading:
    """What the steps since the reading before had to tell; the same on every rank."""

    numbers: dict[str, Any]  # for the row of metrics
    warnings: list[str] = field(default_factory=list)
    fatal: str | None = None


@dataclass(frozen=True)
class _Step:
    number: int
    code: Tensor  # FINE, OVERFLOW or BAD
    suspects: Tensor  # (N,) bool: images whose features are not finite
    indices: Tensor | None


class Watch:
    """Of one rank's steps. Nothing waits for the device but `read`, which every rank must call after the same step."""

    def __init__(self, rank: int, on_nan: Literal["skip", "stop"]) -> None:
        self.skipped = 0  # steps of the run that changed nothing
        self.bad_in_a_row = 0  # of the last ones
        self._rank, self._on_nan = rank, on_nan
        self._steps: list[_Step] = []
        self._collapsed = False

    def add(self, step: int, bad: Tensor, outputs: Outputs, norm: Tensor, scaled: bool, indices: Tensor | None) -> None:
        """Take down a step. `bad`: its update was masked; `scaled`: its loss was, as fp16 needs it."""
        # Scaled gradients that overflow, although the loss is finite, ask for a smaller scale and are no harm.
        worst = ~outputs.loss.detach().isfinite() if scaled else torch.ones_like(bad)
        first, second = outputs.features
        suspects = ~(first.float().sum(1) + second.float().sum(1)).isfinite()
        self._steps.append(_Step(step, bad.int() * (OVERFLOW + worst.int()), suspects, indices))
        self._last = outputs, norm

    def read(self, scale: float = 1.0) -> Reading:
        """What happened since the last reading, at least one step ago. `scale`: that of fp16's loss by now."""
        codes = max_over_ranks(torch.stack([step.code for step in self._steps])).tolist()
        if scale < 1:  # then it is not the scale that overflows
            codes = [BAD if code == OVERFLOW else code for code in codes]
        outputs, norm = self._last
        seen = spread(outputs)
        skipped = sum(code != FINE for code in codes)
        self.skipped += skipped
        numbers: dict[str, Any] = {"grad_norm": float(norm), **vars(seen)}
        numbers |= {"skipped_steps": self.skipped, "skipped_share": skipped / len(codes)}
        bad = self._bad([step for step, code in zip(self._steps, codes, strict=True) if code == BAD])
        if bad:
            numbers["bad_steps"] = [vars(each) for each in bad]
        self._steps = []
        return Reading(numbers, self._skipping(bad) + self._collapse(seen), self._fatal(codes, bad))

    def _bad(self, steps: list[_Step]) -> list[BadStep]:
        """Bad steps of all ranks. Batch norm spreads a NaN over all; the features before it know whose it was."""
        if not steps:
            return []
        mine = []
        for step in steps:
            indices = step.indices if step.indices is not None else torch.empty(0, dtype=torch.int64)
            rows = step.suspects.cpu()
            stands_out = bool(rows.any())
            chosen = indices[rows] if stands_out and len(indices) else indices
            mine.append((stands_out, BadStep(step.number, self._rank, chosen.tolist())))
        everyone = [each for rank in gathered(mine) for each in rank]
        clear = {each.step for stands_out, each in everyone if stands_out}
        named = [each for stands_out, each in everyone if stands_out or each.step not in clear]
        return sorted(named, key=lambda each: (each.step, each.rank))

    def _skipping(self, bad: list[BadStep]) -> list[str]:
        if not bad or self._on_nan == "stop":
            return []
        more = "; …" if len(bad) > 3 else ""
        which = "; ".join(map(str, bad[:3]))
        return [f"loss or gradients were not finite and changed nothing: {which}{more}"]

    def _fatal(self, codes: list[int], bad: list[BadStep]) -> str | None:
        most = 0
        for code in codes:
            self.bad_in_a_row = self.bad_in_a_row + 1 if code == BAD else 0
            most = max(most, self.bad_in_a_row)
        mend = "Try a lower --lr, a longer --warmup-epochs or --clip-grad 1 in a new --out"
        if bad and self._on_nan == "stop":
            return (
                f"loss or gradients are not finite at {bad[0]}; that step changed nothing and the run stops here. "
                f"{mend}, or --on-nan skip to go on without such steps"
            )
        if most >= HOPELESS:
            return f"loss or gradients were not finite for {most} steps in a row, the last {bad[-1]}. {mend}"
        return None

    def _collapse(self, seen: Spread) -> list[str]:
        """Said once, and again only if it had recovered."""
        if not math.isfinite(seen.feature_std + seen.output_std):
            return []
        before, self._collapsed = self._collapsed, seen.collapsed
        if before or not seen.collapsed:
            return []
        return [
            "the model has collapsed: it gives nearly the same vector for every image (feature_std "
            f"{seen.feature_std:.3f}, output_std {seen.output_std:.3f}; 1 is spread evenly, 0 is one point). "
            "Try a lower --lr or a longer --warmup-epochs, in a new --out"
        ]
