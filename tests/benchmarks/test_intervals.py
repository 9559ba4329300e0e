"""The step's intervals: consecutive, complete, and taken from the trainer's own step, which stays as it was."""

import copy
import time
from typing import Any

import pytest
import torch

from benchmarks.intervals import INTERVALS, StepClock, watched
from dali_pipes import DatasetIndex
from model import contrastive
from trainer.config import Config, replace
from trainer.distributed import World
from trainer.engine import Engine, build_model
from trainer.presets import PRESETS

CPU = torch.device("cpu")


@pytest.fixture
def engine(tree):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "moco_dim": 16, "moco_mlp_dim": 32, "image_size": 32}
    config: Config = replace(PRESETS["demo"](), **sizes, data=tree, out=tree, batch_size=4, amp="off", compile="off")
    engine = Engine(config, World(), CPU, DatasetIndex.scan(tree), build_model(config), threads=1)
    yield engine
    engine.loader.close()


def views():
    return tuple(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8) for _ in range(2))


def timed_steps(engine, steps):
    """Intervals of steps, and their wall time in ms taken outside."""
    clock, outside = StepClock(CPU), []
    with watched(engine, clock):
        for _ in range(steps):
            started = time.perf_counter()
            clock.begin()
            clock.switch("prepare")
            engine.train_step(views())
            clock.end()
            outside.append(1000 * (time.perf_counter() - started))
    return clock.read(), outside


def test_intervals_follow_each_other_and_sum_to_the_step():
    clock: Any = StepClock(CPU)
    clock.begin()
    for name in (*INTERVALS[1:], "loss"):  # one of them twice
        time.sleep(0.001)
        clock.switch(name)
    clock.end()
    (marks,) = clock._steps
    whole = 1000 * (marks[-1][1] - marks[0][1])
    (step,) = clock.read()
    assert tuple(step) == INTERVALS
    assert sum(step.values()) == pytest.approx(whole, abs=1e-6)
    assert clock.read() == []


def test_every_part_of_the_trainers_step_has_its_interval(engine):
    steps, outside = timed_steps(engine, 3)
    for step, whole in zip(steps, outside, strict=True):
        assert all(step[name] > 0 for name in INTERVALS)
        # Views are made inside of what is timed outside; the rest of the difference is two calls.
        assert 0 < sum(step.values()) <= whole


def test_watching_changes_no_number(engine):
    x, plain = views(), copy.deepcopy(engine.model)
    expected = plain(*x, momentum=0.9)
    clock = StepClock(CPU)
    clock.begin()
    with watched(engine, clock):
        found = engine.model(*x, momentum=0.9)
    assert found.item() == expected.item()


def test_the_model_is_as_before_afterwards(engine):
    finish = contrastive.finish
    with watched(engine, StepClock(CPU)):
        assert "encode" in vars(engine.model)
        assert contrastive.finish is not finish
    assert not vars(engine.model).keys() & {"encode", "update_momentum", "keys", "loss"}
    assert contrastive.finish is finish
    assert engine.train_step(views()).isfinite()


def test_ranges_carry_the_names_of_the_intervals(engine):
    clock = StepClock(CPU, ranges=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, watched(engine, clock):
        clock.begin()
        clock.switch("prepare")
        engine.train_step(views())
        clock.end()
    assert set(INTERVALS) <= {event.key for event in profiler.key_averages()}
