"""The FLOP count against a model small enough to count by hand."""

import pytest
import torch

from benchmarks.flops import encoder_flops, loss_flops, matmul_rate, step_flops
from model import MoCoV3
from trainer.config import replace
from trainer.presets import PRESETS

WIDTH, HIDDEN, DIM, TOKENS, PATCH, MLP = 8, 32, 4, 5, 16, 12  # 32 px: four patches and the class token


def linear_products(size):
    """Multiply-adds of one image's forward pass, by hand: (through the encoder, through the predictor, attention)."""
    block = TOKENS * (3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    projector = WIDTH * MLP + MLP * MLP + MLP * DIM
    attention = 2 * TOKENS * TOKENS * WIDTH  # q k^T and weights times v
    return block + projector, DIM * MLP + MLP * DIM, attention


def tiny():
    sizes = {"embed_dim": WIDTH, "depth": 1, "num_heads": 2}
    return MoCoV3.build("vit_small", dim=DIM, mlp_dim=MLP, image_size=32, backbone=sizes)


def test_encoders_by_hand():
    batch = 3
    with torch.device("meta"):
        moco, x = tiny(), torch.empty(batch, 3, 32, 32)
    encoder, predictor, attention = linear_products(32)
    patches = 4 * 3 * PATCH * PATCH * WIDTH
    # Forward once for keys and once for queries; backward twice as much as forward, but none through the frozen patch
    # projection. Two operations a multiply-add, two views.
    per_view = 2 * patches + 4 * (encoder + attention) + 3 * predictor
    assert encoder_flops(moco, x, x) == 2 * 2 * batch * per_view


def test_loss_by_hand():
    batch, dim = 6, 4
    # q k^T forward, and the gradient of q; keys get none. Two terms.
    assert loss_flops(batch, dim) == 2 * 2 * (2 * batch * batch * dim)


def test_a_published_model():
    # 8 forward passes an image of the 4.6 GMAC of a ViT-S/16, with the heads.
    config = replace(PRESETS["vit-s-300ep"](), data="unused", out="unused")
    assert step_flops(config, 4) / 4 == pytest.approx(73.5e9, rel=0.002)


def test_the_bound_is_a_rate_a_repeat():
    rates = matmul_rate(torch.device("cpu"), torch.float32, repeats=2)
    assert len(rates) == 2
    assert min(rates) > 1e8
