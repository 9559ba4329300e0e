"""The linear probe against the reference's numbers, against PyTorch's own training loop, and over ranks."""

import math
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision.models

from dali_pipes import EvalBatch
from evaluation.accuracy import Accuracy, hits
from evaluation.linear import Heads, Schedule, probe, validate
from model import MoCoV3
from tests.golden import cases, formula
from tests.golden.compare import assert_close
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("golden", cases.params("lincls"))
def test_three_steps_are_the_references(golden):
    case, name = golden["case"], golden["f64"]["missing_keys"][0].split(".")[0]
    model = cases.build(case).eval()
    classes, feature_dim = golden["f64"]["head_shape"]
    heads = Heads([case["lr"]], feature_dim, classes, Schedule(batch_size=256), dtype=torch.float64)
    (layer,) = heads.layers
    with torch.no_grad():
        for parameter in ("weight", "bias"):
            value = getattr(layer, parameter)
            filled = formula.weight(cases.salt(), f"lincls.{name}.{parameter}", tuple(value.shape))
            assert filled is not None
            value.copy_(torch.from_numpy(filled))

    losses, top1, top5, first = [], [], [], None
    for step in range(3):
        images, _ = cases.views(case, f"|{step}")
        labels = (7 * torch.arange(case["n"]) + step) % classes
        with torch.no_grad():
            features = model.features(images)
            first = layer(features) if first is None else first
        one, five = heads.right(features, labels)[0].tolist()
        top1.append(100.0 * one / len(labels))
        top5.append(100.0 * five / len(labels))
        losses.append(float(heads.step(features, labels)))
    assert first is not None
    mine = {
        "head_shape": list(layer.weight.shape),
        "losses": losses,
        "top1": top1,
        "top5": top5,
        "logits0": formula.digest(first),
        "head.weight": formula.digest(layer.weight),
        "head.bias": formula.digest(layer.bias),
    }
    assert_close(mine, golden["f64"])


@pytest.mark.parametrize(
    ("arch", "theirs"),
    [
        ("resnet18", lambda: torchvision.models.resnet18()),
        ("vit_small", lambda: timm.create_model("vit_small_patch16_224", num_heads=12)),
    ],
)
def test_a_backbone_lacks_the_heads_two_tensors_only(arch, theirs):
    golden = next(golden for golden in cases.load("lincls") if golden["case"]["arch"] == arch)
    state = MoCoV3.build(arch, mlp_dim=8, dim=8).backbone_state_dict()
    found = theirs().load_state_dict(state, strict=False)
    assert sorted(found.missing_keys) == golden["f64"]["missing_keys"]
    assert found.unexpected_keys == golden["f64"]["unexpected_keys"] == []


@pytest.mark.parametrize("golden", cases.load("schedules")["lincls"], ids=lambda golden: str(golden["case"]["epochs"]))
def test_the_learning_rate_is_the_references_in_every_epoch(golden):
    case = golden["case"]
    schedule = Schedule(case["epochs"], case["batch"])
    mine = [schedule.rate(case["base_lr"], epoch) for epoch in range(case["epochs"])]
    assert_close({"lr_per_epoch": mine}, golden)


@pytest.mark.parametrize("golden", [cases.load("units")["accuracy"]], ids=["top1-top5"])
def test_accuracy_counts_as_the_reference(golden):
    logits, labels = torch.tensor(golden["logits"]), torch.tensor(golden["target"])
    one, five = (100 * hits(logits, labels) / len(labels)).tolist()
    assert_close({"top1": one, "top5": five}, golden)


CLASSES, WIDTH, IMAGES = 7, 6, 24


def dataset():
    """Images (24, 3, 1, 2) whose class shows in them, in float64, and labels."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(IMAGES) % CLASSES
    centres = torch.randn(CLASSES, 3, 1, 2, generator=generator, dtype=torch.float64)
    return centres[labels] + 0.5 * torch.randn(IMAGES, 3, 1, 2, generator=generator, dtype=torch.float64), labels


@dataclass
class Loader:
    """A rank's share in a new order each epoch, dealt as EvalLoader deals it."""

    batch_size: int  # of this rank
    rank: int = 0
    world_size: int = 1
    shuffled: bool = True
    epoch: int = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        images, labels = dataset()
        order = torch.arange(IMAGES)
        if self.shuffled:
            order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(self.epoch))
        for rows in order[self.rank :: self.world_size].split(self.batch_size):
            yield EvalBatch(images[rows], labels[rows], rows)


def features(images):
    assert not torch.is_grad_enabled()
    return images.flatten(1)


def heads(lrs, **options):
    schedule = Schedule(**{"epochs": 5, "batch_size": 8, **options})
    return Heads(lrs, WIDTH, CLASSES, schedule, dtype=torch.float64)


def values(chosen):
    return [(layer.weight.detach(), layer.bias.detach()) for layer in chosen.layers]


def by_hand(lr, epochs=5, batch_size=8):
    """The protocol as a plain PyTorch loop, for one learning rate."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    start = heads([1.0]).layers[0]
    layer.load_state_dict(start.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr * batch_size / 256, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 0.5 * (1 + math.cos(math.pi * e / epochs)))
    loader, accuracies, total = Loader(batch_size), [], 0.0
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(batch.images.flatten(1)), batch.labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch.labels)
        scheduler.step()
        images, labels = dataset()
        guesses = layer(images.flatten(1)).argsort(dim=1, descending=True)
        hits = guesses == labels[:, None]
        accuracies.append((float(hits[:, :1].sum()) / IMAGES, float(hits[:, :5].sum()) / IMAGES))
    return layer, accuracies, total / IMAGES


def test_several_learning_rates_in_one_pass_are_each_as_alone():
    lrs = [1.0, 30.0, 300.0]
    chosen = heads(lrs)
    seen = []
    outcomes = probe(
        features, chosen, Loader(8), Loader(10, shuffled=False), lambda done: seen.append(done.accuracies[-1])
    )
    assert [outcome.lr for outcome in outcomes] == lrs
    for place, (outcome, lr) in enumerate(zip(outcomes, lrs, strict=True)):
        layer, accuracies, loss = by_hand(lr)
        assert outcome.loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(chosen.layers[place].weight, layer.weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(chosen.layers[place].bias, layer.bias, rtol=0, atol=1e-12)
        assert [(each[place].top1, each[place].top5) for each in seen] == accuracies
        best = max(range(5), key=lambda epoch: accuracies[epoch][0])
        for found, epoch in ((outcome.last, 4), (outcome.best, best)):
            assert (found.top1, found.top5, found.epoch) == (*accuracies[epoch], epoch + 1)
    assert len({outcome.last.top1 for outcome in outcomes}) > 1


def test_a_learning_rate_that_diverges_leaves_the_others_alone():
    both, alone = heads([math.inf, 30.0]), heads([30.0])
    outcomes = probe(features, both, Loader(8), Loader(8, shuffled=False))
    probe(features, alone, Loader(8), Loader(8, shuffled=False))
    assert not math.isfinite(outcomes[0].loss)
    assert math.isfinite(outcomes[1].loss)
    torch.testing.assert_close(values(both)[1], values(alone)[0], rtol=0, atol=0)


def test_heads_start_alike_at_n_0_001_and_depend_on_the_seed():
    first, second = Heads([0.1, 3.0], 384, 1000, Schedule()).layers
    assert torch.equal(first.weight, second.weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert abs(first.weight.mean().item()) < 1e-4
    assert first.bias.abs().max() == 0
    assert not torch.equal(Heads([0.1], 384, 1000, Schedule(), seed=1).layers[0].weight, first.weight)


def test_fewer_than_five_classes():
    few = Heads([1.0], WIDTH, 3, Schedule(), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    assert few.right(torch.randn(3, WIDTH, dtype=torch.float64), labels)[0, 1] == 3


def on_a_rank(world_size):
    rank = dist.get_rank() if dist.is_initialized() else 0
    chosen = heads([1.0, 30.0])
    outcomes = probe(
        features, chosen, Loader(8 // world_size, rank, world_size), Loader(5, rank, world_size, shuffled=False)
    )
    return outcomes, values(chosen)


def test_two_ranks_are_one_rank(tmp_path):
    outcomes, weights = on_a_rank(1)
    for found, theirs in run_on_ranks(on_a_rank, 2, folder=tmp_path):
        torch.testing.assert_close(theirs, weights, rtol=0, atol=1e-12)
        for mine, other in zip(outcomes, found, strict=True):
            assert (other.lr, other.last, other.best) == (mine.lr, mine.last, mine.best)
            assert other.loss == pytest.approx(mine.loss, abs=1e-12)


def unequal_shares():
    """Rank 0 holds one image, which is right; rank 1 holds three, of which one is."""
    sure = Heads([1.0], WIDTH, CLASSES, Schedule())
    with torch.no_grad():
        sure.layers[0].weight.zero_()
        sure.layers[0].bias.copy_(-torch.arange(CLASSES))
    labels = torch.tensor([0]) if dist.get_rank() == 0 else torch.tensor([0, 4, 6])
    return validate(features, sure, [EvalBatch(torch.zeros(len(labels), 3, 1, 2), labels, labels)], epoch=1)


def test_ranks_of_unequal_shares_have_the_right_total(tmp_path):
    for found in run_on_ranks(unequal_shares, folder=tmp_path):
        assert found == [Accuracy(top1=2 / 4, top5=3 / 4, epoch=1)]
