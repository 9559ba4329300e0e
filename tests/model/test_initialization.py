"""Fresh weights against statistics of the reference's initialisation over ten seeds."""

import math
import re
from collections import defaultdict

import pytest
import torch

from model import MoCoV3
from tests.golden.cases import load


@pytest.fixture(scope="module", params=["vit_small", "vit_conv_small", "resnet50"])
def fresh(request):
    torch.manual_seed(0)
    model = MoCoV3.build(request.param, stop_grad_conv1=False)
    pooled = defaultdict(list)
    for name, p in model.named_parameters():
        if not name.startswith("momentum_encoder.") and not name.endswith("pos_embed"):
            pooled[kind(name, p)].append(p.detach().double().flatten())
    return load("init_stats")[request.param]["kinds"], {key: torch.cat(values) for key, values in pooled.items()}, model


def kind(name, p):
    """The golden's name for tensors of one law: layer numbers replaced by N, shape appended."""
    name = re.sub(r"(blocks|layer\d)\.\d+\.", r"\1.N.", name)
    return f"{name} {'x'.join(map(str, p.shape))}"


def test_every_kind_of_parameter_follows_its_law(fresh):
    golden, mine, _ = fresh
    assert set(mine) == set(golden)
    for name, law in golden.items():
        values = mine[name]
        assert values.numel() == law["numel_pooled"], name
        mean, std = values.mean().item(), values.std(correction=0).item()
        expected_mean, expected_std = law["mean"][0], law["std"][0]
        if expected_std == 0:
            assert values.eq(expected_mean).all(), name
            continue
        # Six standard errors of this one sample; the average over ten seeds adds little to them.
        assert abs(mean - expected_mean) < 6 * expected_std / math.sqrt(values.numel()), name
        kurtosis = law["excess_kurtosis"][0]
        assert abs(std / expected_std - 1) < 6 * math.sqrt((kurtosis + 2) / (4 * values.numel())), name
        if kurtosis < -1:  # uniform: the bounds tell the law most sharply
            assert law["min"][0] * 1.001 < values.min().item() < law["min"][1] * 0.98, name
            assert law["max"][1] * 1.001 > values.max().item() > law["max"][0] * 0.98, name
        else:
            standardised = (values - mean) / std
            error = math.sqrt(24 / values.numel())
            assert abs(standardised.pow(4).mean().item() - 3 - kurtosis) < 8 * error, name


def test_the_momentum_encoder_starts_equal(fresh):
    model = fresh[2]
    pairs = zip(model.base_encoder.parameters(), model.momentum_encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
