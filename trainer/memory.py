"""When a batch does not fit: find the one that would, by trying."""

import gc

import torch

from trainer.config import Config
from trainer.distributed import World
from trainer.engine import autocast, build_model, build_optimizer


def fitting_batch(config: Config, world: World, device: torch.device) -> int | None:
    """The largest global batch, halving `--batch-size`, of which one step fits on this device; None if none does.

    It runs whole steps (forward of both encoders, backward, optimizer) of this rank's share alone, without the other
    ranks; the caller has let go of its own model before.
    """
    share = config.optim.batch_size // world.size // 2
    while share * world.size >= 2:
        release()
        try:
            _step(config, device, share)
        except torch.OutOfMemoryError:
            share //= 2
        else:
            return share * world.size
    return None


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _step(config: Config, device: torch.device, share: int) -> None:
    dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
    model = build_model(config, sync_bn=False).to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(config, model)
    size = config.data.image_size
    views = torch.zeros(2, share, size, size, 3, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    with autocast(config, device):
        queries, keys = model.queries(views[0], views[1]), model.keys(views[0], views[1])
        # Stands for the contrastive loss, which gathers from the other ranks; its logits are small beside the rest.
        loss = (queries[0] * keys[1]).sum() + (queries[1] * keys[0]).sum()
    loss.backward()
    optimizer.step()
