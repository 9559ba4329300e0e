from typing import Any

import pytest
import timm
import torch

from model import MoCoV3
from model.backbones import build_backbone, features, freeze_patch_projection, state_without_head
from model.vision_transformer import sincos_position_embedding
from tests.golden import cases, formula
from tests.golden.compare import assert_close


@pytest.mark.parametrize("golden", cases.params("features"))
def test_features(golden):
    case = golden["case"]
    model = cases.build({**case, "dim": 8, "mlp_dim": 8})
    x, _ = cases.views(case)
    with torch.no_grad():
        mine = {"eval": formula.digest(model.eval().features(x))}
        if "vit" in case["arch"]:
            mine |= transformer_parts(model.base_encoder, x)
        mine["train"] = formula.digest(model.train().features(x))
    assert set(mine) == set(golden["f64"])
    assert_close(mine, golden["f64"])


def transformer_parts(vit, x):
    patches = vit.patch_embed(x)
    tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), patches], dim=1) + vit.pos_embed
    return {
        "patch_embed_eval": formula.digest(patches),
        "tokens_in_eval": formula.digest(tokens),
        "block0_eval": formula.digest(vit.blocks[0](tokens)),
    }


@pytest.mark.parametrize(
    ("arch", "dim", "family"),
    [
        ("resnet18", 512, "resnet"),
        ("resnet50", 2048, "resnet"),
        ("vit_tiny_patch16_224", 192, "vit"),
        ("convnext_atto", 320, "resnet"),
        ("efficientnet_b0", 1280, "resnet"),
        ("mobilenetv3_small_050", 1024, "resnet"),
        ("swin_tiny_patch4_window7_224", 768, "vit"),
        ("deit_tiny_distilled_patch16_224", 192, "vit"),
        ("dla34", 512, "resnet"),
        ("regnetx_002", 368, "resnet"),
        ("volo_d1_224", 384, "vit"),
    ],
)
def test_features_and_head_of_other_families(arch, dim, family):
    backbone = build_backbone(arch)
    assert (backbone.feature_dim, backbone.family) == (dim, family)
    module = backbone.module.eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        bare = module(x)
        assert bare.shape == (1, dim)
        torch.testing.assert_close(features(module, x), bare)
        head = torch.nn.Linear(dim, 3)
        with_head = backbone.with_head(head)
        torch.testing.assert_close(with_head(x), head(bare))
        torch.testing.assert_close(features(with_head, x), bare)


@pytest.mark.parametrize(
    ("arch", "size", "overrides", "dim", "family"),
    [
        ("vit_large_patch14_224", (28, 56), {"depth": 1}, 1024, "vit"),
        ("vit_small_patch8_224", 32, {"depth": 1}, 384, "vit"),
        ("vit_base_patch14_dinov2", 28, {"depth": 1}, 768, "vit"),
        ("swin_tiny_patch4_window7_224", (64, 128), {"embed_dim": 24, "depths": (1, 1, 1, 1)}, 192, "vit"),
        ("convnext_tiny", (64, 96), {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, 64, "resnet"),
        ("pvt_v2_b0", 64, {}, 256, "vit"),
        ("maxvit_nano_rw_256", 64, {}, 512, "vit"),
        ("eca_vovnet39b", 64, {}, 1024, "resnet"),
    ],
)
def test_other_patches_and_image_sizes(arch, size, overrides, dim, family):
    model = MoCoV3.build(arch, dim=8, mlp_dim=16, image_size=size, backbone=overrides)
    assert (model.feature_dim, model.heads) == (dim, family)
    height, width = (size, size) if isinstance(size, int) else size
    views = torch.randn(2, 2, 3, height, width)
    model(views[0], views[1], momentum=0.9).backward()
    assert model.features(views[0]).shape == (2, dim)


@pytest.mark.parametrize(
    ("arch", "family"), [("hiera_tiny_224", "vit"), ("focalnet_tiny_srf", "resnet"), ("mixer_s32_224", "resnet")]
)
def test_transformers_are_told_by_their_attention_heads(arch, family):
    with torch.device("meta"):
        assert build_backbone(arch).family == family


@pytest.mark.parametrize("arch", ["vit_small", "vit_conv_small"])
def test_a_vit_takes_images_that_are_not_square(arch):
    """Height first: two rows of four patches, and the token of a patch is where its row and column say."""
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    vit: Any = build_backbone(arch, (32, 64), sizes).module.eval()
    assert torch.equal(vit.pos_embed, sincos_position_embedding(64, rows=2, columns=4))
    image = torch.zeros(1, 3, 32, 64)
    marked = image.clone()
    marked[..., 16:, 48:] = 1  # the patch in row 1, column 3
    with torch.no_grad():
        moved = (vit.patch_embed(marked) - vit.patch_embed(image)).norm(dim=2)[0]
        assert moved.argmax() == 1 * 4 + 3
        assert vit(marked).shape == (1, 64)
    with pytest.raises((AssertionError, ValueError), match="height"):  # timm's stem asserts
        vit(torch.zeros(1, 3, 64, 32))


def test_resnets_start_with_empty_residual_branches():
    last = [part for name, part in build_backbone("resnet18").module.named_parameters() if name.endswith("bn2.weight")]
    assert len(last) == 8
    assert all(weight.eq(0).all() for weight in last)


def test_heads_follow_the_family_unless_told_otherwise():
    def norms_of_predictor(arch, heads):
        model = MoCoV3.build(arch, dim=8, mlp_dim=16, image_size=32, heads=heads, backbone=overrides.get(arch, {}))
        return sum(isinstance(part, torch.nn.BatchNorm1d) for part in model.predictor.children())

    overrides = {"vit_small": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    assert [norms_of_predictor(*pair) for pair in (("vit_small", "auto"), ("resnet18", "auto"))] == [2, 1]
    assert [norms_of_predictor(*pair) for pair in (("vit_small", "resnet"), ("resnet18", "vit"))] == [1, 2]


@pytest.mark.parametrize(
    ("arch", "overrides", "message"),
    [
        ("vit_smal", {}, "--arch vit_smal is not known; nearest: vit_small, "),
        ("resnet5", {}, "--arch resnet5 is not known; nearest: resnet5"),
        ("", {}, "--arch  is not known; nearest: "),
        (
            "vit_small",
            {"embed_dims": 64},
            r"--backbone \{'embed_dims': 64\} does not fit --arch vit_small: .*embed_dims",
        ),
        ("resnet18", {"depth": 3}, "does not fit --arch resnet18: .*depth"),
        ("vit_tiny_patch16_224", {"layers": 3}, "does not fit --arch vit_tiny_patch16_224: .*layers"),
    ],
)
def test_refused(arch, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(arch, overrides=overrides)


def test_timm_sizes_and_overrides_arrive():
    module = build_backbone("vit_tiny_patch16_224", 64, {"depth": 2}).module
    state = state_without_head(module)
    assert list(state) == list(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0).state_dict())
    assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == {"0", "1"}
    assert state["pos_embed"].shape == (1, 1 + 16, 192)
    freeze_patch_projection(module)
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen == ["trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias"]
    with pytest.raises(
        ValueError, match="--image-size 72 is not divisible by the patch size 16 of vit_tiny_patch16_224"
    ):
        build_backbone("vit_tiny_patch16_224", 72)
