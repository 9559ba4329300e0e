"""The contrastive loss of one pair of views (paper, section 3, equation 1 and algorithm 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import finish, rank, start_gather


def contrastive_loss(q: Tensor, k: Tensor, temperature: float, under_way: Tensor | None = None) -> Tensor:
    """InfoNCE of this rank's queries against the keys of all ranks, times 2 x temperature (paper, section 5).

    q, k: (N, D), any length, row i of k is the positive of row i of q; every rank has the same N. Keys get no gradient.
    under_way: the `collectives.start_gather` of k, if that was done before.
    Returns a scalar, the mean over this rank's queries, in float32 (float64 for float64 input). DDP averages gradients,
    so that the ranks together follow the mean over all queries. Without a process group the batch is its own world.
    """
    # The reference forms the logits in float16 under AMP, which rounds a similarity near 1 to about 5e-4 and lets that
    # error grow by 1 / temperature. Logits in float32 cost well under a thousandth of a step.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        keys = finish(start_gather(k) if under_way is None else under_way).to(dtype)
        logits = F.normalize(q.to(dtype)) @ F.normalize(keys).T / temperature
        labels = torch.arange(len(q), device=q.device) + rank() * len(q)
        return F.cross_entropy(logits, labels) * (2 * temperature)
