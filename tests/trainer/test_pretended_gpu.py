"""Without a GPU: a step on one would mix no devices and make the host wait for nothing."""

import pytest
import torch

from .engines import engine_for, views_for
from .pretended_gpu import GPU, Mixed, OnGpu, Waits, pretended_gpu, waiting_is_an_error


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch):
        yield GPU


def steps(engine, views):
    """Losses of a step on each, as tensors."""
    found = [engine.train_step(pair, torch.arange(len(pair[0]))) for pair in views]
    engine.loader.close()
    return found


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "bf16"],
        ["--amp", "bf16", "--arch", "vit_conv_small", "--optimizer", "lars"],
        ["--amp", "bf16", "--arch", "resnet18", "--embed-dim", None, "--depth", None, "--num-heads", None],
        ["--amp", "fp16"],
        ["--amp", "fp16", "--optimizer", "lars"],
        ["--amp", "bf16", "--clip-grad", 1.0],
        ["--amp", "bf16", "--microbatch", 5],
        ["--amp", "fp16", "--microbatch", 5, "--checkpoint-activations"],
    ],
    ids=lambda flags: "-".join(map(str, flags)).strip("-"),
)
def test_a_step_mixes_no_devices_and_waits_for_nothing(flags, sample, gpu):
    engine = engine_for(sample / "train", "--device", "cuda", "--warmup-epochs", 0, *flags)
    views = [tuple(map(OnGpu, views_for(engine_for(sample / "train"), seed))) for seed in range(2)]
    steps(engine, views[:1])  # makes the optimizer's state
    with waiting_is_an_error():
        losses = steps(engine, views)
    assert all(loss.device == gpu and loss.isfinite() for loss in losses)
    reading = engine.watch.read()  # this may wait
    assert reading.fatal is None
    assert reading.numbers["skipped_steps"] == 0


@pytest.mark.parametrize("flags", [[], ["--optimizer", "lars"]])
def test_its_step_is_the_cpus(flags, sample, monkeypatch):
    engine = engine_for(sample / "train", "--warmup-epochs", 0, *flags)
    views = [views_for(engine, seed) for seed in range(3)]
    expected = [loss.item() for loss in steps(engine, views)]
    with pretended_gpu(monkeypatch):
        engine = engine_for(sample / "train", "--device", "cuda", "--warmup-epochs", 0, *flags)
        losses = steps(engine, [tuple(map(OnGpu, pair)) for pair in views])
        assert [loss.item() for loss in losses] == expected


def test_what_a_gpu_refuses_is_refused(gpu):
    x, y = torch.ones(3, device=gpu), torch.ones(3)
    assert x.device == (x + 1).device == torch.zeros_like(x).device == gpu
    with pytest.raises(Mixed, match="add"):
        x + y
    with pytest.raises(Mixed):
        x.add_(y)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to(GPU),
    ],
)
def test_what_makes_the_host_wait_is_told(asks, gpu):
    x = torch.ones(3, device=gpu)
    asks(x)
    with waiting_is_an_error():
        torch.ones(3).to(gpu, non_blocking=True)
        with pytest.raises(Waits):
            asks(x)
