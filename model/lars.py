"""LARS (You et al. 2017, arXiv 1708.03888) as MoCo v3 uses it for ResNets: after SimCLR's rules on what is adapted."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step of a weight is scaled by trust_coefficient x ||weight|| / ||gradient||.

    Weight decay and scaling apply to tensors of more than one dimension; biases and norms take plain momentum SGD. The
    decayed gradient enters the norm; a zero norm of weight or gradient means no scaling. The learning rate stays
    outside the momentum buffer, whose state key is "mu". Parameters without a gradient are skipped and get no state.

    Nothing here waits for the device: trust ratios never leave it. While the attribute `found_inf` is a tensor, float32
    of one element on the parameters' device, a step with 1 in it changes neither parameters nor buffers; the fused
    optimizers of torch have the same.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # Matrices and kernels first: their gradients are replaced by adapted copies, the others are used as they
            # are.
            params.sort(key=lambda p: p.ndim <= 1)
            if not params:
                continue
            grads = [p.grad for p in params]
            adapted = sum(p.ndim > 1 for p in params)
            if adapted:
                grads[:adapted] = _adapted(
                    params[:adapted], grads[:adapted], group["weight_decay"], group["trust_coefficient"]
                )
            buffers = [self._buffer(p) for p in params]
            moved = list(torch._foreach_mul(buffers, group["momentum"]))
            torch._foreach_add_(moved, grads)
            self._write(params, list(torch._foreach_add(params, moved, alpha=-group["lr"])))
            self._write(buffers, moved)
        return loss

    def _write(self, old: list[Tensor], new: list[Tensor]) -> None:
        if self.found_inf is None:
            torch._foreach_copy_(old, new)
            return
        # torch._fused_sgd_ knows found_inf and would do the whole step in one kernel, but takes no notice of strides: a
        # contiguous gradient of a channels_last kernel gives wrong numbers without an error (torch 2.14, CPU).
        bad = self.found_inf.bool()
        for before, after in zip(old, new, strict=True):
            torch.where(bad, before, after, out=before)

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(p)
        return state["mu"]


def _adapted(params: list[Tensor], grads: list[Tensor], weight_decay: float, trust_coefficient: float) -> list[Tensor]:
    """Decayed gradients times their trust ratios, in new tensors."""
    decayed = list(torch._foreach_add(grads, params, alpha=weight_decay))
    weight_norms = torch.stack(torch._foreach_norm(params))
    grad_norms = torch.stack(torch._foreach_norm(decayed))
    ratios = trust_coefficient * weight_norms / grad_norms
    ratios = torch.where((weight_norms > 0) & (grad_norms > 0), ratios, torch.ones_like(ratios))
    torch._foreach_mul_(decayed, list(ratios.unbind()))
    return decayed
