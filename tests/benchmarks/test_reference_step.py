"""The yardstick does the same arithmetic as the trainer, only slower: else the comparison would mean nothing."""

import copy

import pytest
import torch

from benchmarks.reference_step import Changes, LoopLARS, ReferenceStep
from model import LARS
from trainer.config import Config, replace
from trainer.presets import PRESETS

CPU = torch.device("cpu")


@pytest.fixture
def config() -> Config:
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "moco_dim": 16, "moco_mlp_dim": 32, "image_size": 32}
    return replace(PRESETS["demo"](), **sizes, data="unused", out="unused", amp="off", compile="off", batch_size=4)


def test_lars_is_lars():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    theirs = copy.deepcopy(ours)
    fast = LARS(ours.parameters(), lr=0.3, weight_decay=0.1, momentum=0.9)
    slow = LoopLARS(list(theirs.parameters()), weight_decay=0.1, momentum=0.9)
    slow.param_groups[0]["lr"] = 0.3
    for _ in range(4):
        x = torch.randn(6, 5)
        for network, optimizer in ((ours, fast), (theirs, slow)):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_step_gives_the_loss_of_the_model(config, optimizer):
    reference = ReferenceStep(replace(config, optimizer=optimizer, warmup_epochs=0), CPU)
    model = copy.deepcopy(reference.model)
    x1, x2 = torch.randn(2, 4, 3, 32, 32)
    expected = model(x1, x2, momentum=config.model.moco_m).item()
    assert reference.train_step(x1, x2, 1e-3, config.model.moco_m) == pytest.approx(expected, rel=1e-5)
    # The second step starts from other weights.
    assert reference.train_step(x1, x2, 1e-3, config.model.moco_m) != pytest.approx(expected, rel=1e-5)


@pytest.fixture
def views():
    """16 images that differ in colour, so that batch norm has something to tell apart; in two views."""
    torch.manual_seed(1)
    colours = torch.randint(0, 200, (1, 16, 3, 1, 1))
    return (colours + torch.randint(0, 56, (2, 16, 3, 32, 32))).to(torch.uint8)


def losses(step, views, count=4):
    x = [step.prepared(view) for view in views]
    return [float(step.train_step(*x, lr=1e-3, momentum=0.9)) for _ in range(count)]


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
@pytest.mark.parametrize(
    "changes",
    [
        Changes(foreach_ema=True),
        Changes(fused_optimizer=True),
        Changes(no_host_wait=True),
        Changes(channels_last=True),
        Changes(uint8=True),
        Changes(foreach_ema=True, fused_optimizer=True, no_host_wait=True, channels_last=True, uint8=True),
    ],
)
def test_no_change_changes_what_is_learned(config, views, optimizer, changes):
    config = replace(config, optimizer=optimizer)
    expected = losses(ReferenceStep(config, CPU), views)
    assert len(set(expected)) == 4
    assert losses(ReferenceStep(config, CPU, changes), views) == pytest.approx(expected, rel=1e-4)


def test_both_views_in_one_pass_learn_the_same(config, views):
    config = replace(config, arch="vit_small")  # the demo's stem has batch norm, to which a view is a batch
    expected = losses(ReferenceStep(config, CPU), views)
    assert losses(ReferenceStep(config, CPU, Changes(one_pass=True)), views) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("changes", "near"), [(Changes(amp="bf16"), 0.02), (Changes(float8=True), 0.05)])
def test_fewer_bits_are_near_and_not_the_same(config, views, changes, near):
    if changes.float8:
        pytest.importorskip("torchao.float8", exc_type=ImportError)
    expected = losses(ReferenceStep(config, CPU), views)
    found = losses(ReferenceStep(config, CPU, changes), views)
    assert found != expected
    assert found[0] == pytest.approx(expected[0], rel=near)  # the first: from the same weights
    assert found == pytest.approx(expected, rel=0.15)
