"""Has the model stopped telling images apart? A few numbers on features and outputs, and when they mean collapse."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.distributed import sum_over_ranks
from trainer.objective import Outputs

# Fresh networks have spreads of features between 0.24 (a conv-stem ViT of width 32) and 0.93 (ConvNeXt-T), trained ones
# more. Below this, the unit vectors of two images are on average closer than 1 - 0.05^2, a cosine of 0.9975.
COLLAPSED = 0.05


@dataclass(frozen=True)
class Spread:
    """Of one step, over the batch of all ranks, mean of the two views.

    feature_std, output_std: standard deviation of the L2-normalised backbone features and of the queries, over the
    batch, root mean square over channels, times sqrt(dim): 1 is spread evenly over the sphere, 0 is one and the same
    vector for every image. The heads' batch norm pulls outputs apart again, so that features tell more.
    positive_cosine, negative_cosine: of a query with the key of the same image, and with those of all others.
    """

    feature_std: float
    output_std: float
    positive_cosine: float
    negative_cosine: float

    @property
    def collapsed(self) -> bool:
        """Whether features or outputs are, to all practical purposes, the same for every image; False for NaN."""
        return self.feature_std < COLLAPSED or self.output_std < COLLAPSED


def spread(outputs: Outputs) -> Spread:
    """The numbers of the step that gave `outputs`; waits for the device, and every rank must call it."""
    f, q, k = ([_unit(x) for x in pair] for pair in (outputs.features, outputs.queries, outputs.keys))
    positive = (q[0] * k[1]).sum() + (q[1] * k[0]).sum()
    scalars = torch.stack([positive, positive.new_tensor(len(q[0])), *(x.square().sum() for x in (*f, *q))])
    # Sums of unit vectors are all that the spread of a whole batch takes, so that ranks exchange no features.
    sums = [x.sum(0) for x in (*f, *q, *k)]
    total = sum_over_ranks(torch.cat([scalars, *sums])).cpu()
    (positive, n, *squares), sums = total[:6], list(total[6:].split([len(x) for x in sums]))
    stds = [
        (square / n - (x / n).square().sum()).clamp(min=0).sqrt() for square, x in zip(squares, sums[:4], strict=True)
    ]
    products = sums[2] @ sums[5] + sums[3] @ sums[4]
    return Spread(
        feature_std=float(stds[0] + stds[1]) / 2,
        output_std=float(stds[2] + stds[3]) / 2,
        positive_cosine=float(positive / n) / 2,
        negative_cosine=float((products - positive) / (n * (n - 1))) / 2,
    )


def _unit(x: Tensor) -> Tensor:
    # In float64: near collapse the spread is a small difference of numbers near 1.
    return F.normalize(x.double(), dim=1)
