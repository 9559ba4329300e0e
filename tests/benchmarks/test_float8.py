"""Float8 linear layers against the rounding and the products done by hand, and where they stand in the benchmarks."""

import sys

import pytest
import torch

from benchmarks.float8 import float8_blocks
from model import MoCoV3
from trainer.config import ConfigError

CPU = torch.device("cpu")
SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoCoV3.build("vit_small", dim=16, mlp_dim=32, image_size=32, backbone=SIZES)


def rounded(x, dtype):
    """To float8 and back: the largest magnitude becomes the largest float8."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).float() / scale


def test_products_are_of_float8_values_in_both_directions(model):
    pytest.importorskip("torchao.float8", exc_type=ImportError)
    layer = float8_blocks(model, CPU).base_encoder.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(layer, torch.nn.Linear)
    x = torch.randn(5, 32, requires_grad=True)
    y = layer(x)
    towards = torch.randn_like(y)
    y.backward(towards)

    coarse_x, coarse_w = rounded(x.detach(), torch.float8_e4m3fn), rounded(layer.weight.detach(), torch.float8_e4m3fn)
    coarse_towards = rounded(towards, torch.float8_e5m2)
    torch.testing.assert_close(y, coarse_x @ coarse_w.T + layer.bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, coarse_towards @ coarse_w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, coarse_towards.T @ coarse_x, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, x @ layer.weight.T + layer.bias, rtol=1e-3, atol=1e-3)


def test_only_the_blocks_change_and_no_weight_does(model):
    pytest.importorskip("torchao.float8", exc_type=ImportError)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(part) for name, part in model.named_modules()}
    after = float8_blocks(model, CPU)
    torch.testing.assert_close(dict(after.state_dict()), before, rtol=0, atol=0)
    changed = {name for name, part in after.named_modules() if type(part) is not kinds[name]}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    encoders = ("base_encoder", "momentum_encoder")
    assert changed == {f"{encoder}.blocks.0.{layer}" for encoder in encoders for layer in layers}


def test_a_backbone_without_such_layers_is_told():
    pytest.importorskip("torchao.float8", exc_type=ImportError)
    with pytest.raises(ConfigError, match="use a transformer"):
        float8_blocks(MoCoV3.build("resnet18", dim=16, mlp_dim=32, image_size=32), CPU)


def test_without_torchao_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        float8_blocks(model, CPU)
