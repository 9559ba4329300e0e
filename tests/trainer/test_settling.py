"""A resumed process adds up gradients as one that never stopped, also from three ranks on."""

import itertools

import pytest
import torch
import torch.distributed as dist

from dali_pipes import DatasetIndex
from tests.ranks import run_on_ranks
from tests.trainer.conftest import TINY
from trainer.config import parse
from trainer.distributed import World
from trainer.engine import Engine, build_model
from trainer.settling import settle

STEPS, STOP = 4, 2
# Two buckets: DDP's first is 1 MiB, and these gradients are 3.
FLAGS = [*TINY, "--batch-size", "12", "--moco-mlp-dim", "384", "--out", "run", "--warmup-epochs", "0"]


def engine_for(data, settled):
    config = parse([*FLAGS, "--data", data])
    config.check(dist.get_world_size())
    world = World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torchrun=True)
    index = DatasetIndex.scan(f"{data}/train")
    engine = Engine(config, world, torch.device("cpu"), index, build_model(config), threads=1)
    if settled:
        settle(engine)
    return engine


def advance(engine, steps):
    engine.loader.set_epoch(engine.step // engine.steps_per_epoch)
    for batch in itertools.islice(engine.loader, steps):
        engine.train_step(batch.views)


def difference(data, settled):
    """Most that a weight differs between a run and the same run stopped and gone on with by another process."""
    whole, first, second = (engine_for(data, settled) for _ in range(3))
    advance(whole, STEPS)
    advance(first, STOP)
    second.load_state_dict(first.state_dict())
    advance(second, STEPS - STOP)
    weights = [torch.cat([p.flatten() for p in engine.model.parameters()]) for engine in (whole, second)]
    assert whole.step == second.step == STEPS
    return (weights[0] - weights[1]).abs().max().item()


@pytest.mark.parametrize("settled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_four_ranks_go_on_to_the_last_bit_only_if_settled(sample, tmp_path, settled):
    (worst, *_) = run_on_ranks(difference, str(sample), settled, world_size=4, folder=tmp_path, timeout=300)
    assert (worst == 0) == settled


def test_what_is_settled_is_as_it_was(sample, tmp_path):
    assert all(run_on_ranks(untouched, str(sample), folder=tmp_path))


def untouched(data):
    before, rng = engine_for(data, settled=False), torch.get_rng_state()
    after = engine_for(data, settled=False)
    torch.set_rng_state(rng)
    settle(after)
    ours, theirs = after.state_dict(), before.state_dict()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in after.model.parameters())
    assert {name: ours[name] for name in ours if name not in ("model", "optimizer")} == {
        name: theirs[name] for name in theirs if name not in ("model", "optimizer")
    }
    assert not ours["optimizer"]["state"]
    return all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
