"""The two MLPs behind a backbone: projector and predictor (paper, section 3 and appendix A).

They follow the reference release where the paper is silent: no Linear has a bias, hidden batch norms are affine, a last
batch norm is not, and Linear weights keep PyTorch's default initialisation.
"""

from itertools import pairwise
from typing import Literal

from torch import nn

Layout = Literal["vit", "resnet"]


def projector(features: int, hidden: int, dim: int, layout: Layout) -> nn.Sequential:
    """Backbone features (N, features) to embeddings (N, dim): three layers for "vit", two for "resnet".

    Both end in a batch norm without weight and bias.
    """
    widths = [features, hidden, hidden, dim] if layout == "vit" else [features, hidden, dim]
    return _mlp(widths, last_norm=True)


def predictor(hidden: int, dim: int, layout: Layout) -> nn.Sequential:
    """Embeddings (N, dim) to queries (N, dim): two layers.

    A batch norm without weight and bias ends the "vit" layout; the "resnet" layout has none there.
    """
    return _mlp([dim, hidden, dim], last_norm=layout == "vit")


def _mlp(widths: list[int], last_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
