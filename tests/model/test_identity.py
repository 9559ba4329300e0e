"""What weights were built with, read back from their names and shapes."""

import pytest
import torch

from model import MoCoV3
from model.identity import nearest_architecture, settings

SIZES = {"vit_small": (384, 12), "vit_base": (768, 12), "vit_conv_small": (384, 11), "vit_conv_base": (768, 11)}


def state_of(arch, **options):
    with torch.device("meta"):
        return MoCoV3.build(arch, **options).state_dict()


@pytest.mark.parametrize("arch", [*SIZES, "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_the_architectures_of_the_reference(arch):
    state = state_of(arch, dim=32, mlp_dim=48)
    assert nearest_architecture(state, prefer="resnet101") == arch
    found = settings(state)
    heads = "vit" if arch in SIZES else "resnet"
    assert (found["heads"], found["moco_dim"], found["moco_mlp_dim"]) == (heads, 32, 48)
    if arch in SIZES:
        assert (found["embed_dim"], found["depth"], found["image_size"]) == (*SIZES[arch], 224)


def test_other_sizes_and_layouts():
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    state = state_of("vit_conv_small", image_size=96, heads="resnet", backbone=sizes)
    assert nearest_architecture(state, prefer="vit_conv_base") == "vit_conv_base"
    found = settings(state)
    assert (found["embed_dim"], found["depth"], found["image_size"], found["heads"]) == (64, 2, 96, "resnet")
    assert "image_size" not in settings(state_of("vit_small", image_size=(32, 64), backbone=sizes))
    assert "embed_dim" not in settings(state_of("resnet18"))
