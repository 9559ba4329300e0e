"""When a step does not fit: find, by trying, the chunk or the batch that would."""

import gc
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from dali_pipes.stream import release_memory
from model.moco import Pair
from trainer.config import Config, ConfigError, replace
from trainer.distributed import World
from trainer.engine import autocast, build_model, build_optimizer
from trainer.guard import Guard
from trainer.microbatch import check_microbatch, chunked_step
from trainer.objective import Objective


def fitting_microbatch(config: Config, world: World, device: torch.device) -> int | None:
    """The largest `--microbatch` with which a step fits on this device; None if none does or the backbone takes none.

    Tried are halves of this rank's share, or of the `--microbatch` in force.
    """
    share = config.optim.batch_size // world.size
    start = min(config.run.microbatch or share, share) // 2
    try:
        check_microbatch(start, config.model.arch, build_model(config, sync_bn=False))
    except ConfigError:
        return None
    return _largest(start, 1, lambda size: _step(config, device, share, size))


def fitting_batch(config: Config, world: World, device: torch.device) -> int | None:
    """The largest global batch, halving `--batch-size`, of which one step fits on this device; None if none does."""
    microbatch, share = config.run.microbatch, config.optim.batch_size // world.size // 2
    fits = _largest(share, 2, lambda share: _step(config, device, share, microbatch))
    return fits and fits * world.size


def lighter(config: Config, bound: bool, untried: bool = False) -> str:
    """What may take less memory and this run can be given, for the user; `bound`: it must learn the same.

    untried: smaller chunks and batches are among it; else it is known that none fits.
    """
    found = []
    if untried:
        with suppress(ConfigError):
            check_microbatch(1, config.model.arch, build_model(config, sync_bn=False))
            found.append("a smaller --microbatch")
    if not config.run.checkpoint_activations:
        with suppress(ValueError):
            build_model(replace(config, checkpoint_activations=True), sync_bn=False)
            found.append("--checkpoint-activations")
    if bound or untried:
        found.append("more GPUs")
    if not bound:
        found.append("a smaller --batch-size" if untried else "a smaller --arch or --image-size")
    return " or ".join(found)


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        release_memory()


def _largest(start: int, least: int, attempt: Callable[[int], None]) -> int | None:
    size = start
    while size >= least:
        release()
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return size
    return None


def _step(config: Config, device: torch.device, share: int, microbatch: int | None) -> None:
    """A whole step (forward of both encoders, backward, optimizer) of this rank's share, without the other ranks.

    The caller has let go of its own model before.
    """
    dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
    model = build_model(config, sync_bn=False).to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.start_gather, model.loss = _alone, _stand_in
    optimizer, guard = build_optimizer(config, model), Guard(model)
    size = config.data.image_size
    views = torch.zeros(2, share, size, size, 3, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    guard.remember()
    if microbatch is not None and microbatch < share:
        precision = partial(autocast, config, device)
        chunked_step(model, (views[0], views[1]), config.model.moco_m, microbatch, precision, lambda loss: loss)
    else:
        with autocast(config, device):
            loss = Objective(model)(views[0], views[1], config.model.moco_m).loss
        loss.backward()
    optimizer.step()


def _alone(keys: Pair) -> Pair:
    """For the exchange of the keys: the other ranks take no part."""
    return keys


def _stand_in(queries: Pair, keys: Pair, under_way: Pair) -> Tensor:
    """For the contrastive loss over the keys of all ranks; its logits are small beside the rest."""
    return (queries[0] * keys[1]).sum() + (queries[1] * keys[0]).sum()
