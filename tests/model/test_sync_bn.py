import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from model import SyncBatchNorm
from model.sync_bn import convert
from tests.ranks import run_on_ranks

SHAPES = {"2d": (12, 5), "4d": (12, 5, 3, 2)}
# Rows of the whole batch on each of two ranks, of equal and of different number.
SHARES = {"equal": (6, 6), "unequal": (3, 9)}


def batch(shape, seed, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + offset


def norm(cls, affine):
    layer = cls(5, affine=affine, momentum=0.3).double()
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 5))
            layer.bias.copy_(torch.linspace(-1, 1, 5))
    return layer


def passes(layer, rows):
    """Two training passes, gradients of both, and an eval pass, on the given rows of the batch."""
    results = {}
    for name, shape in SHAPES.items():
        for step in range(2):
            x = batch(shape, step, offset=step)[rows].requires_grad_()
            y = layer(x)
            (y * batch(shape, 10 + step)[rows]).sum().backward()
            results[f"{name} y{step}"], results[f"{name} grad{step}"] = y.detach(), x.grad
    results["eval"] = layer.eval()(batch(SHAPES["2d"], 3)[rows])
    results["state"] = layer.state_dict()
    results["parameter gradients"] = {key: p.grad for key, p in layer.named_parameters()}
    return results


class WholeBatchNorm(nn.BatchNorm2d):
    """PyTorch's own batch norm, for two and for four dimensions."""

    def _check_input_dim(self, input):
        pass


def rank_passes(share, affine):
    start = sum(share[: dist.get_rank()])
    return passes(norm(SyncBatchNorm, affine), slice(start, start + share[dist.get_rank()]))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_ranks_together_equal_batch_norm_of_the_whole_batch(share, affine, tmp_path):
    expected = passes(norm(WholeBatchNorm, affine), slice(None))
    ranks = run_on_ranks(rank_passes, share, affine, folder=tmp_path)
    for name, value in expected.items():
        if name == "state":
            for rank in ranks:
                assert list(rank["state"]) == list(value)
                torch.testing.assert_close(rank["state"], value, rtol=1e-13, atol=1e-13)
        elif name == "parameter gradients":
            total = {key: ranks[0][name][key] + ranks[1][name][key] for key in value}
            torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-12)
        else:
            together = torch.cat([rank[name] for rank in ranks])
            torch.testing.assert_close(together, value, rtol=1e-12, atol=1e-12)


def rank_details():
    """What needs two ranks but no comparison with a whole batch in float64."""
    rank = dist.get_rank()
    layer = norm(SyncBatchNorm, affine=True).float()
    images = batch((4, 5, 6, 6), rank).float().to(memory_format=torch.channels_last)
    half = images.bfloat16().requires_grad_()
    out = layer(half)
    out.sum().backward()
    # A channel whose mean is a thousand times its deviation.
    shifted = batch((4096, 5), 20 + rank, offset=2000)
    precise = norm(SyncBatchNorm, affine=False)(shifted)
    single = norm(SyncBatchNorm, affine=False).float()(shifted.float())
    with torch.no_grad():
        without_grad = norm(SyncBatchNorm, affine=True).float()(images)
    return {
        "channels_last": layer(images).is_contiguous(memory_format=torch.channels_last),
        "dtypes": (out.dtype, half.grad.dtype, layer.weight.grad.dtype, layer.running_mean.dtype),
        "bfloat16 error": (out.float() - without_grad).abs().max().item(),
        "float32 error": (single - precise).abs().max().item(),
    }


def test_dtypes_memory_format_and_precision(tmp_path):
    for result in run_on_ranks(rank_details, folder=tmp_path):
        assert result["channels_last"]
        assert result["dtypes"] == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
        # bfloat16 rounds values of up to 8 to 1/64; statistics in bfloat16 would be further off.
        assert result["bfloat16 error"] < 0.04
        assert result["float32 error"] < 2e-3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_without_process_group_it_is_plain_batch_norm(shape):
    layers = [norm(cls, affine=True) for cls in (SyncBatchNorm, WholeBatchNorm)]
    x = batch(shape, 0)
    assert torch.equal(*(layer(x) for layer in layers))
    assert torch.equal(*(layer.eval()(x) for layer in layers))
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=0, atol=0)


def test_convert_keeps_everything_but_the_class():
    frozen = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2).requires_grad_(False)
    resting = nn.BatchNorm1d(4, affine=False).eval()
    tree = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), frozen), BatchNormAct2d(4), nn.Flatten(), resting)
    parameters = list(tree.parameters())
    keys = list(tree.state_dict())
    x = batch((6, 3, 1, 1), 0).float()
    tree(x)
    expected = tree(x)

    converted = convert(tree)
    assert converted is tree
    synchronised = [part for part in tree.modules() if isinstance(part, SyncBatchNorm)]
    first, second, third = synchronised
    assert all(a is b for a, b in zip(parameters, tree.parameters(), strict=True))
    assert list(tree.state_dict()) == keys
    assert [p.requires_grad for p in first.parameters()] == [False, False]
    assert [p.requires_grad for p in second.parameters()] == [True, True]
    assert (first.eps, first.momentum, first.training, third.training) == (1e-3, 0.2, True, False)
    assert torch.equal(tree(x), expected)
    assert isinstance(convert(nn.BatchNorm1d(3)), SyncBatchNorm)


def test_what_cannot_be_synchronised_is_refused():
    class Extra(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="Extra cannot be synchronised"):
        convert(nn.Sequential(Extra(3)))
    with pytest.raises(ValueError, match="momentum=None"):
        convert(nn.BatchNorm1d(3, momentum=None))
    with pytest.raises(ValueError, match="input has 3 dimensions"):
        SyncBatchNorm(3)(torch.zeros(2, 3, 4))
