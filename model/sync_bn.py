"""Batch norm over the batch of all ranks, on CPU and GPU, compilable as one graph.

torch.nn.SyncBatchNorm works on GPUs only, so that a test on two CPU ranks could never see it. This one speaks through
functional collectives, which torch.compile traces without a graph break.
"""

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from model.collectives import add_up, gather, world_size


class SyncBatchNorm(_BatchNorm):
    """Batch norm of (N, C) or (N, C, H, W) whose training statistics are those of the batch over all ranks.

    Parameters, buffers and state-dict keys are those of nn.BatchNorm1d/2d, and so is the running variance: unbiased,
    here over the global batch. The ranks may hold batches of different sizes. Statistics are in float32 for float16,
    bfloat16 and float32 input, in float64 for float64; the output has the input's dtype. In eval mode, without a
    process group and in a world of one it is plain batch norm.

    Raises ValueError for input of another rank and for momentum=None (the cumulative average).
    """

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        if self.momentum is None:
            raise ValueError(
                "SyncBatchNorm: momentum=None (cumulative average) is not supported; give a float, e.g. 0.1"
            )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"SyncBatchNorm: input has {input.dim()} dimensions; expected (N, C) or (N, C, H, W)")

    def forward(self, input: Tensor) -> Tensor:
        """Normalised input; the running statistics move in training mode."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, variance, count = _global_statistics(input)
        self._track(mean, variance, count)
        inverse_std = torch.rsqrt(variance + self.eps)
        return _Normalize.apply(input, self.weight, self.bias, mean, inverse_std, count)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm, then drop and activation: the counterpart of timm's BatchNormAct2d."""

    def __init__(self, num_features: int, drop: Any, act: Any, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        """act(drop(batch norm(input)))."""
        return self.act(self.drop(super().forward(input)))


def convert(module: nn.Module) -> nn.Module:
    """The same tree with every nn.BatchNorm1d/2d (and timm's BatchNormAct2d) replaced by its synchronised counterpart.

    Parameters and buffers are taken over as the objects they are: an optimizer that holds them stays right, and so does
    requires_grad. (A momentum encoder whose fresh batch-norm weights asked for gradients would make DDP wait for them
    for ever and never average anything.)

    The tree is changed in place; the returned module differs from the argument only where that is itself a batch norm.
    Raises ValueError for another subclass of batch norm, whose extra behaviour would be lost.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        return _counterpart(module)
    for name, child in module.named_children():
        replacement = convert(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _counterpart(old: _BatchNorm) -> SyncBatchNorm:
    settings = {
        "eps": old.eps,
        "momentum": old.momentum,
        "affine": old.affine,
        "track_running_stats": old.track_running_stats,
    }
    new: SyncBatchNorm
    if type(old) in (nn.BatchNorm1d, nn.BatchNorm2d):
        new = SyncBatchNorm(old.num_features, **settings)
    elif type(old) is BatchNormAct2d:
        new = SyncBatchNormAct(old.num_features, old.drop, old.act, **settings)
    else:
        raise ValueError(
            f"{type(old).__name__} cannot be synchronised: only BatchNorm1d, BatchNorm2d and BatchNormAct2d can"
        )
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    return new.train(old.training)


@torch.no_grad()
def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and number of values a channel (scalar tensor) over all ranks."""
    x = x.to(_statistics_dtype(x))
    variance, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
    # Gathering each rank's mean and variance, instead of adding sums of squares, keeps the digits of a channel whose
    # mean is large against its deviation.
    count = mean.new_full((1,), x.numel() // x.shape[1])
    ranks = gather(torch.cat([mean, variance, count])[None])
    means, variances, counts = ranks.split([x.shape[1], x.shape[1], 1], dim=1)
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    return mean, variance, total


class _Normalize(torch.autograd.Function):
    """(x - mean) / std * weight + bias, with the gradient through mean and std of the batch of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inverse_std: Tensor,
        count: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        y = _standardized(x, mean, inverse_std)
        if weight is not None and bias is not None:
            y = y * _along_channels(weight, x) + _along_channels(bias, x)
        # Not a cast that changes nothing: with it, torch 2.11 compiles this to a function whose gradient is 0.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        grad = grads[0].to(_statistics_dtype(x))
        standardized = _standardized(x, mean, inverse_std)
        dims = _all_but_channels(x)
        # The local sums are this rank's gradients of bias and weight, which DDP averages; x needs the sums over all
        # ranks.
        grad_bias, grad_weight = grad.sum(dims), (grad * standardized).sum(dims)
        sums = add_up(torch.stack([grad_bias, grad_weight]))
        mean_grad, mean_product = (_along_channels(each, x) for each in (sums / count).unbind())
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = (grad - mean_grad - standardized * mean_product) * _along_channels(scale, x)
        if weight is None:
            return grad_x.to(x.dtype), None, None, None, None, None
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None


def _standardized(x: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _along_channels(mean, x)) * _along_channels(inverse_std, x)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))
