"""The arithmetic of a step, counted, and the rate at which this device multiplies matrices, measured."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import MoCoV3, contrastive_loss
from trainer.config import Config, replace
from trainer.engine import build_model

COUNTED_BATCH = 2  # batch norm needs two; the encoders' count is proportional


def step_flops(config: Config, batch: int) -> float:
    """Floating-point operations of one step on `batch` images in two views, multiply and add as two.

    Counted by torch's FlopCounterMode: matrix products, convolutions and attention of both forward passes, the
    backward pass and the loss; no norms, no element-wise work, no optimizer. On the meta device, as the counter knows
    no CPU kernel of attention: counted there, a ViT-S would lose 8 % of its work.
    """
    with torch.device("meta"):
        moco = build_model(replace(config, dtype="float32"))
        x = torch.empty(COUNTED_BATCH, 3, config.data.image_size, config.data.image_size)
    return encoder_flops(moco, x, x) / COUNTED_BATCH * batch + loss_flops(batch, config.model.moco_dim)


def encoder_flops(moco: MoCoV3, x1: torch.Tensor, x2: torch.Tensor) -> int:
    """Queries forward and backward, keys forward, of these two views."""
    with FlopCounterMode(display=False) as counter:
        q1, q2 = moco.queries(x1, x2)
        moco.keys(x1, x2)
        (q1.sum() + q2.sum()).backward()
    return int(counter.get_total_flops())


def loss_flops(batch: int, dim: int) -> int:
    """Both terms of the loss, forward and backward, with the keys of one rank."""
    queries = torch.zeros(batch, dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        contrastive_loss(queries, torch.zeros(batch, dim), temperature=1.0).backward()
    return 2 * int(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> tuple[float, ...]:
    """Floating-point operations a second of a large square matrix product, a value a repeat.

    The bound that the step is held against: what this very device does, on its present clocks.
    """
    side, products = (8192, 20) if device.type == "cuda" else (1024, 4)
    # Ones draw less power than data, and a card at its power cap would then run faster than it can in training.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    rates = []
    for _ in range(repeats + 1):
        seconds = _seconds(a, b, out, products)
        rates.append(2 * side**3 * products / seconds)
    return tuple(rates[1:])  # the first one warmed up


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, products: int) -> float:
    if a.device.type != "cuda":
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        return time.perf_counter() - started
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(products):
        torch.mm(a, b, out=out)
    after.record()
    torch.cuda.synchronize(a.device)
    return float(before.elapsed_time(after)) / 1000
