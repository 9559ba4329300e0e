"""A batch in chunks, exactly: the contrastive loss sees the whole batch, the backbone never more than a chunk.

Accumulating gradients as usual would give each chunk its own negatives and its own batch statistics, which is another
method. Here the backbone runs twice (as in GradCache, Gao et al. 2021, arXiv 2101.06983): first without a graph, for
the features of the whole batch; on these heads, batch norm and loss work as ever, down to the gradient of the features;
then chunk by chunk with a graph, into which that gradient is fed. Memory holds the activations of one chunk.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from model import MoCoV3
from model.backbones import head
from model.moco import Pair
from trainer.config import ConfigError
from trainer.objective import Outputs

Precision = Callable[[], AbstractContextManager[Any]]


def check_microbatch(microbatch: int | None, arch: str, model: MoCoV3) -> None:
    """Raise `ConfigError` unless chunks give the backbone's features of the whole batch, twice alike."""
    if microbatch is None:
        return
    outside = set(head(model.base_encoder).modules())
    for name, part in model.base_encoder.named_modules():
        if part in outside:
            continue
        if isinstance(part, _BatchNorm):
            raise ConfigError(
                f"--microbatch {microbatch} with --arch {arch}: its batch norm ({name}) would take its statistics from "
                "a chunk instead of the batch; use an --arch without batch norm, such as vit_small, or no --microbatch"
            )
        if _drops(part):
            raise ConfigError(
                f"--microbatch {microbatch} with --arch {arch}: its dropout ({name}) would draw other masks when the "
                "chunk is computed again; use an --arch without dropout, or no --microbatch"
            )


def chunked_step(
    model: MoCoV3,
    views: Pair,
    momentum: float,
    size: int,
    precision: Precision,
    scale: Callable[[Tensor], Tensor],
) -> Outputs:
    """Forward and backward of one rank's share, `size` images at a time; gradients are added to `.grad`.

    The same as `scale(loss).backward()` of the whole, but for rounding. `precision` opens an autocast context: a new
    one a part, as its cache would hand casts of weights made without a graph to the passes that need one.
    """
    model.update_momentum(momentum)
    key_features = _whole(model.encode_key_view, views, size, precision)
    with precision():
        keys = model.project_keys(key_features)
    under_way = model.start_gather(keys)
    features = _whole(model.encode_view, views, size, precision)
    for each in features:
        each.requires_grad_()
    with precision():
        queries = model.predict(features)
        loss = model.loss(queries, keys, under_way)
    scale(loss).backward()
    _backward(model, views, features, size, precision)
    return Outputs.of(loss, features, queries, keys)


@torch.no_grad()
def _whole(encode: Callable[[Tensor], Tensor], views: Pair, size: int, precision: Precision) -> Pair:
    """Features of all images of each view, computed chunk by chunk."""
    with precision():
        first, second = (torch.cat([encode(chunk) for chunk in view.split(size)]) for view in views)
    return first, second


def _backward(model: MoCoV3, views: Pair, features: Pair, size: int, precision: Precision) -> None:
    """From the gradient of the features to those of the backbone's parameters."""
    for view, cached in zip(views, features, strict=True):
        assert cached.grad is not None
        for chunk, gradient in zip(view.split(size), cached.grad.split(size), strict=True):
            with precision():
                again = model.encode_view(chunk)
            again.backward(gradient)


def _drops(part: nn.Module) -> bool:
    """Whether a module of torch's or timm's draws random numbers in training."""
    if isinstance(part, _DropoutNd):
        return part.p > 0
    if isinstance(part, PatchDropout):
        return part.prob > 0
    return isinstance(part, (DropPath, DropBlock2d)) and part.drop_prob > 0
