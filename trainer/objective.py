"""What a rank computes in a step: the loss, and what the watch over the run looks at beside it."""

from typing import NamedTuple

from torch import Tensor, nn

from model import MoCoV3
from model.moco import Pair


class Outputs(NamedTuple):
    """Of one rank's share of a batch; everything but the loss is detached from the graph."""

    loss: Tensor
    features: Pair
    queries: Pair
    keys: Pair

    @classmethod
    def of(cls, loss: Tensor, features: Pair, queries: Pair, keys: Pair) -> "Outputs":
        """Detach what is only looked at."""
        (f1, f2), (q1, q2) = features, queries
        return cls(loss, (f1.detach(), f2.detach()), (q1.detach(), q2.detach()), keys)


class Objective(nn.Module):
    """MoCoV3.forward that also returns what it saw on the way. It is what DDP wraps."""

    def __init__(self, model: MoCoV3) -> None:
        super().__init__()
        self.model = model

    def forward(self, x1: Tensor, x2: Tensor, momentum: float) -> Outputs:
        """One step's forward pass on two views (N, 3, S, S); moves the momentum encoder on the way."""
        self.model.update_momentum(momentum)
        keys = self.model.keys(x1, x2)
        under_way = self.model.start_gather(keys)
        features = self.model.encode(x1, x2)
        queries = self.model.predict(features)
        return Outputs.of(self.model.loss(queries, keys, under_way), features, queries, keys)
