"""Fine-tuning against PyTorch's own loop, layer by layer and over ranks."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dali_pipes import EvalBatch
from evaluation.finetune import FineTuning, Recipe, classifier, finetune, parameter_groups
from model.backbones import build_backbone, features
from model.sync_bn import convert
from tests.ranks import run_on_ranks

CLASSES, IMAGES, SIZE = 5, 24, 32
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
PLAIN: dict[str, Any] = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 8,
}


def network_of(arch="vit_small", **overrides) -> Any:
    torch.manual_seed(0)
    backbone = build_backbone(arch, SIZE, overrides or (VIT if arch.startswith("vit_") else {}))
    return backbone.with_head(classifier(backbone.feature_dim, CLASSES, seed=3))


class Loader:
    """A rank's share of random images in a new order each epoch, dealt as EvalLoader deals it; float64."""

    def __init__(self, batch_size, rank=0, world_size=1, shuffled=True):
        self.batch_size, self.rank, self.world_size, self.shuffled, self.epoch = (
            batch_size,
            rank,
            world_size,
            shuffled,
            0,
        )

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return math.ceil(IMAGES / self.world_size / self.batch_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        labels = torch.arange(IMAGES) % CLASSES
        images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        images += labels[:, None, None, None]  # brightness tells the class
        order = torch.arange(IMAGES)
        if self.shuffled:
            order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(self.epoch))
        for rows in order[self.rank :: self.world_size].split(self.batch_size):
            yield EvalBatch(images[rows], labels[rows], rows)


def scales(network, decay=0.5):
    """{parameter's name: learning rate over the classifier's}."""
    groups = parameter_groups(network, Recipe(layer_decay=decay))
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}, groups, names


def test_layers_of_a_transformer():
    network = network_of(embed_dim=16, depth=3, num_heads=2)
    network.patch_embed.proj.requires_grad_(False)  # as pre-training leaves it
    found, groups, names = scales(network)
    assert set(found) == set(names.values())
    for name, scale in found.items():
        stem = name.startswith(("cls_token", "pos_embed", "patch_embed"))
        block = 3 if name.startswith("norm") else int(name.split(".")[1]) + 1 if "blocks" in name else 0
        assert scale == (1 if name.startswith("head") else 0.5 ** (4 - (0 if stem else block))), name
    undecayed = {names[p] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= undecayed
    assert not {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} & undecayed


def test_layers_of_a_resnet():
    found, _, names = scales(network_of("resnet18"))
    assert set(found) == set(names.values())
    assert found["fc.weight"] == found["fc.bias"] == 1
    depths = {name: round(-math.log2(scale)) for name, scale in found.items()}
    assert depths["conv1.weight"] == depths["bn1.bias"] == 9  # below eight blocks
    assert [depths[f"layer{i}.{j}.conv1.weight"] for i in (1, 2, 3, 4) for j in (0, 1)] == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "convnext_atto"])
def test_layers_of_a_timm_model(arch):
    found, _, names = scales(network_of(arch, depth=2) if arch.startswith("vit") else network_of(arch))
    assert set(found) == set(names.values())
    assert found["head.weight"] == found["head.bias"] == 1
    assert max(scale for name, scale in found.items() if name.startswith("trunk.")) == 0.5
    stem = "trunk.patch_embed.proj.weight" if arch.startswith("vit") else "trunk.stem.0.weight"
    assert found[stem] == min(found.values())


def by_hand(arch, recipe):
    """The same as a plain loop: an optimizer a parameter, whose learning rate is its layer's."""
    network = network_of(arch).double()
    scale, groups, names = scales(network, recipe.layer_decay)
    decays = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    optimizers = {
        name: torch.optim.AdamW([parameter], lr=1.0, weight_decay=decays[name])
        for name, parameter in network.named_parameters()
    }
    loader, losses = Loader(recipe.batch_size), []
    for epoch in range(recipe.epochs):
        loader.set_epoch(epoch)
        network.train()
        for step, batch in enumerate(loader):
            at = epoch + step / 3
            ramp = at if at < 1 else 0.5 * (1 + math.cos(math.pi * (at - 1) / 2))
            loss = F.cross_entropy(network(batch.images), batch.labels)
            network.zero_grad()
            loss.backward()
            losses.append(loss.item())
            for name, optimizer in optimizers.items():
                optimizer.param_groups[0]["lr"] = recipe.lr * recipe.batch_size / 256 * ramp * scale[name]
                optimizer.step()
    network.eval()
    (whole,) = Loader(IMAGES, shuffled=False)
    with torch.no_grad():
        right = (network(whole.images).argmax(1) == whole.labels).double().mean().item()
    return network, sum(losses[-3:]) / 3, right


@pytest.mark.parametrize("arch", ["vit_small", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_it_is_pytorchs_own_loop(arch):
    recipe = Recipe(lr=0.05, **PLAIN)
    network, loss, right = by_hand(arch, recipe)
    tuned = network_of(arch).double()
    outcome = finetune(FineTuning(tuned, CLASSES, recipe), Loader(8), Loader(10, shuffled=False))
    torch.testing.assert_close(dict(tuned.state_dict()), dict(network.state_dict()), rtol=0, atol=1e-10)
    assert outcome.loss == pytest.approx(loss, abs=1e-12)
    assert (outcome.last.top1, outcome.last.top5, outcome.last.epoch) == (right, 1.0, 3)
    assert outcome.best.top1 >= right
    assert not tuned.training


def test_mixing_repeats_itself_and_leaves_the_loaders_images_alone():
    def losses():
        tuning = FineTuning(network_of().double(), CLASSES, Recipe(**{**PLAIN, "mixup": 0.8, "cutmix": 1.0}))
        batch = next(iter(Loader(8)))
        before = batch.images.clone()
        found = [tuning.step(batch.images, batch.labels, 1, step, 9).item() for step in range(4)]
        assert torch.equal(batch.images, before)
        return found

    first = losses()
    assert first == losses()
    tuning = FineTuning(network_of().double(), CLASSES, Recipe(**PLAIN))
    batch = next(iter(Loader(8)))
    assert tuning.step(batch.images, batch.labels, 1, 0, 9).item() != first[0]


def test_mixing_and_smoothing_are_the_recipes():
    tuning = FineTuning(network_of().double(), CLASSES, Recipe(**{**PLAIN, "mixup": 0.8, "cutmix": 0.3}))
    assert tuning.mixup is not None
    assert (tuning.mixup.mixup_alpha, tuning.mixup.cutmix_alpha) == (0.8, 0.3)
    network = network_of().double()
    smooth = FineTuning(network, CLASSES, Recipe(**{**PLAIN, "label_smoothing": 0.1}))
    batch = next(iter(Loader(8)))
    expected = F.cross_entropy(network(batch.images), batch.labels, label_smoothing=0.1).item()
    assert smooth.step(batch.images, batch.labels, 0, 0, 3).item() == pytest.approx(expected)
    mixed = FineTuning(network_of().double(), CLASSES, Recipe(**{**PLAIN, "mixup": 0.8, "label_smoothing": 0.1}))
    assert mixed.mixup is not None
    assert mixed.mixup.label_smoothing == 0.1


def test_a_batch_norm_is_not_asked_to_learn_from_one_image():
    """24 images in batches of 23: of the one that is left over, the convolutions' last maps are a single number."""
    recipe = Recipe(**{**PLAIN, "batch_size": 23})
    outcome = finetune(FineTuning(network_of("resnet18").double(), CLASSES, recipe), Loader(23), Loader(24))
    assert math.isfinite(outcome.loss)


def on_a_rank(arch, world_size):
    rank = dist.get_rank() if dist.is_initialized() else 0
    network = network_of(arch).double()
    tuning = FineTuning(convert(network), CLASSES, Recipe(lr=0.05, **PLAIN))
    outcome = finetune(tuning, Loader(8 // world_size, rank, world_size), Loader(5, rank, world_size, shuffled=False))
    return outcome, network.state_dict()


def test_two_ranks_are_one_rank(tmp_path):
    outcome, weights = on_a_rank("vit_conv_small", 1)  # its stem has batch norms
    for found, theirs in run_on_ranks(on_a_rank, "vit_conv_small", 2, folder=tmp_path):
        torch.testing.assert_close(dict(theirs), dict(weights), rtol=0, atol=1e-9)
        assert (found.last, found.best) == (outcome.last, outcome.best)
        assert found.loss == pytest.approx(outcome.loss, abs=1e-9)


def test_the_classifier_sits_on_the_features():
    network = network_of().double().eval()
    batch = next(iter(Loader(8)))
    logits = network(batch.images)
    torch.testing.assert_close(logits, network.head(features(network, batch.images)))
    assert network.head.weight.std().item() == pytest.approx(0.01, rel=0.2)
