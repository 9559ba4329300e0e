import math

import pytest
import torch

from model import MoCoV3
from model.vision_transformer import sincos_position_embedding, vision_transformer
from tests.golden.cases import load
from tests.golden.compare import assert_close
from tests.golden.formula import digest

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize("golden", load("posembed"), ids=lambda g: f"{g['case']['dim']}-{g['case']['img']}")
def test_position_embedding(golden):
    table = sincos_position_embedding(golden["case"]["dim"], *golden["grid"])[0]
    assert_close({"digest": digest(table)}, golden)
    if "full" in golden:
        assert_close({"full": table.tolist()}, golden)


def test_position_embedding_of_a_grid_that_is_not_square_is_rows_then_columns():
    dim, rows, columns = 16, 2, 4
    table = sincos_position_embedding(dim, rows, columns)[0]
    for row in range(rows):
        for column in range(columns):
            angles = [[p * 10000 ** (-i / 4) for i in range(4)] for p in (row, column)]
            expected = [f(angle) for angle_block in angles for f in (math.sin, math.cos) for angle in angle_block]
            assert table[1 + row * columns + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_position_embedding_is_a_frozen_parameter():
    vit = vision_transformer("vit_small", 48, **TINY)
    assert isinstance(vit.pos_embed, torch.nn.Parameter)
    assert not vit.pos_embed.requires_grad
    assert "pos_embed" in vit.state_dict()


@pytest.mark.parametrize(
    ("arch", "depth", "width", "heads", "parameters"),
    [
        ("vit_small", 12, 384, 12, 21_665_664),
        ("vit_base", 12, 768, 12, 85_798_656),
        ("vit_conv_small", 11, 384, 12, 20_617_392),
        ("vit_conv_base", 11, 768, 12, 82_199_904),
    ],
)
def test_sizes(arch, depth, width, heads, parameters):
    vit = vision_transformer(arch)
    assert (len(vit.blocks), vit.embed_dim, vit.blocks[0].attn.num_heads) == (depth, width, heads)
    assert {part.eps for part in vit.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
    assert sum(p.numel() for p in vit.parameters()) == parameters


@pytest.mark.parametrize(("arch", "frozen"), [("vit_small", True), ("vit_conv_small", False)])
def test_stop_grad_conv1_freezes_a_plain_patch_projection_only(arch, frozen):
    for stop in (True, False):
        model = MoCoV3.build(arch, dim=8, mlp_dim=16, image_size=32, stop_grad_conv1=stop, backbone=TINY)
        projection = model.base_encoder.get_submodule("patch_embed.proj")
        assert {p.requires_grad for p in projection.parameters()} == {not (stop and frozen)}
        trained = {name for name, p in model.base_encoder.named_parameters() if p.requires_grad}
        assert "cls_token" in trained
        assert "blocks.0.attn.qkv.weight" in trained


@pytest.mark.parametrize(
    ("arch", "arguments", "message"),
    [
        (
            "vit_small",
            {"image_size": 100},
            r"--image-size 100 is not divisible by the patch size 16 of vit_small; use 96 or 112",
        ),
        ("vit_conv_small", {"image_size": 8}, "use 16 or 32"),
        ("vit_small", {"embed_dim": 66, "num_heads": 3}, "embed_dim 66 is not divisible by 4"),
        ("vit_conv_small", {"embed_dim": 60, "num_heads": 4}, "embed_dim 60 is not divisible by 8"),
        ("vit_conv_small", {"patch_size": 8}, "a conv stem has patches of 16"),
    ],
)
def test_refused_sizes(arch, arguments, message):
    with pytest.raises(ValueError, match=message):
        vision_transformer(arch, **arguments)
