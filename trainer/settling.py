"""A throw-away first step, after which DDP adds up gradients in one order, in fresh and in resumed processes alike."""

import torch

from trainer.engine import Engine
from trainer.saving import copy_aside

VIEWS = 2


def settle(engine: Engine) -> None:
    """Take one training step on noise and undo it; every rank must call it, before anything is loaded.

    DDP lays out its buckets anew after a process's first backward pass, in the order in which the gradients came. With
    3 ranks or more the sum of a gradient depends on where in a bucket it lies (gloo and NCCL start the ring at another
    rank), so the first step of a process would be rounded differently from the same step in the middle of one.
    """
    if engine.world.size == 1 or engine.chunk is not None:  # chunks are added up without DDP, in one order
        return
    before = copy_aside(engine.state_dict(), {})  # on the CPU: a batch that fits is to fit here, too
    images, size = engine.config.optim.batch_size // engine.world.size, engine.config.data.image_size
    noise = torch.Generator().manual_seed(engine.world.rank)
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        engine.train_step(
            tuple(
                torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=noise)
                .to(engine.device)
                .contiguous(memory_format=torch.channels_last)
                for _ in range(VIEWS)
            )
        )
    engine.optimizer.zero_grad(set_to_none=True)
    engine.load_state_dict(before)
