"""An engine of its own for a test of the step, and what it has learned."""

from pathlib import Path

import torch
import torch.distributed as dist

from dali_pipes import DatasetIndex
from trainer import config as configuration
from trainer.distributed import World
from trainer.engine import Engine, build_model

from .conftest import TINY


def engine_for(tree, *flags):
    """An engine on `tree` with the flags of the tiny run, a plain ViT instead of its conv stem, and `flags`."""
    arch = [] if "--arch" in flags else ["--arch", "vit_small"]
    argv = [*TINY, "--data", str(tree), "--out", "unused", "--amp", "off", "--compile", "off", *arch, *map(str, flags)]
    config = configuration.parse(argv)
    world = World()
    if dist.is_initialized():
        world = World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torchrun=True)
    device = torch.device("cuda", 0) if config.run.device == "cuda" else torch.device("cpu")
    return Engine(config, world, device, DatasetIndex.scan(Path(tree)), build_model(config), threads=1)


def views_for(engine, seed):
    """Two views of this rank's share of a batch, the same images whatever the number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    size, batch = engine.config.data.image_size, engine.config.optim.batch_size
    views = torch.randint(0, 256, (2, batch, 3, size, size), generator=generator, dtype=torch.uint8)
    share = batch // engine.world.size
    mine = views[:, engine.world.rank * share : (engine.world.rank + 1) * share].to(engine.device)
    return tuple(view.contiguous(memory_format=torch.channels_last) for view in mine)


def gradients(engine):
    return {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}


def learned(engine):
    """All that a step may change: parameters, buffers, the optimizer's state."""
    state = engine.optimizer.state_dict()["state"]
    slots = {f"{slot}.{key}": value.clone() for slot, each in state.items() for key, value in each.items()}
    return {name: value.clone() for name, value in engine.model.state_dict().items()} | slots
