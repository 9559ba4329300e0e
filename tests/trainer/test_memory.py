"""What is tried when a step does not fit; that memory runs out is pretended here, and real in tests/gpu."""

import pytest
import torch

from trainer import config as configuration
from trainer import memory
from trainer.distributed import World

from .conftest import TINY

CPU = torch.device("cpu")


def config_for(*flags):
    return configuration.parse([*TINY, "--data", "unused", "--out", "unused", "--amp", "off", *flags])


@pytest.fixture
def room_for(monkeypatch):
    """Pretends that so many images at once fit through the backbone; the steps that fit are run."""

    def limit(images):
        step = memory._step

        def limited(config, device, share, microbatch):
            if min(share, microbatch or share) > images:
                raise torch.OutOfMemoryError
            step(config, device, share, microbatch)

        monkeypatch.setattr(memory, "_step", limited)

    return limit


def test_the_batch_and_the_chunk_that_fit(room_for):
    config, ranks = config_for("--arch", "vit_small"), World(size=2)
    room_for(3)  # of 8 a rank
    assert memory.fitting_batch(config, ranks, CPU) == 4
    assert memory.fitting_microbatch(config, ranks, CPU) == 2
    assert memory.fitting_microbatch(configuration.replace(config, microbatch=2), ranks, CPU) == 1
    # In chunks the batch may stay larger.
    assert memory.fitting_batch(configuration.replace(config, microbatch=3), ranks, CPU) == 8


def test_nothing_fits(room_for):
    room_for(0)
    assert memory.fitting_batch(config_for("--arch", "vit_small"), World(), CPU) is None
    assert memory.fitting_microbatch(config_for("--arch", "vit_small"), World(), CPU) is None


def test_batch_norm_leaves_only_a_smaller_batch(room_for):
    room_for(8)
    assert memory.fitting_microbatch(config_for(), World(), CPU) is None
    assert memory.fitting_batch(config_for(), World(), CPU) == 8
