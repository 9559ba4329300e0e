import copy

import pytest
import torch
import torch.nn.functional as F

from model import MoCoV3, collectives, contrastive_loss
from tests.golden import cases, formula
from tests.golden.compare import assert_close

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4}


def tiny(arch="vit_small", **options):
    torch.manual_seed(0)
    return MoCoV3.build(arch, dim=16, mlp_dim=32, image_size=32, backbone=TINY, **options)


def uint8_images(n=4, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return images.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("golden", cases.params("moco_step"))
def test_one_step_against_the_reference(golden):
    case, expected, facts = golden["case"], golden["f64"], golden["facts"]
    model = cases.build(case)
    x1, x2 = cases.views(case)
    q1, q2 = model.queries(x1, x2)
    model.update_momentum(case["m"])
    k1, k2 = model.keys(x1, x2)
    loss = model.loss((q1, q2), (k1, k2))
    loss.backward()

    parameters = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    first, second = contrastive_loss(q1, k2, case["T"]), contrastive_loss(q2, k1, case["T"])
    mine = {
        "loss": loss.item(),
        "loss_q1k2": first.item(),
        "loss_q2k1": second.item(),
        **{name: formula.digest(value) for name, value in zip(("q1", "q2", "k1", "k2"), (q1, q2, k1, k2), strict=True)},
        "pos_cos_q1k2": F.cosine_similarity(q1, k2).tolist(),
        "pos_cos_q2k1": F.cosine_similarity(q2, k1).tolist(),
        "grad_global_norm": cases.global_norm(gradients.values()),
        "grad_group_norm": cases.group_norms(gradients),
        "grad_norm_all": {name: gradient.norm().item() for name, gradient in gradients.items()},
        "grad": cases.digests(gradients, expected["grad"]),
        "momentum_after": cases.digests(parameters, expected["momentum_after"]),
        "momentum_global_norm": cases.global_norm(model.momentum_encoder.parameters()),
        "bn_after": cases.batch_norm_digests(model, expected["bn_after"]),
    }
    assert_close(mine, expected)
    assert set(gradients) == set(expected["grad_norm_all"])

    base = {name: p for name, p in parameters.items() if name.startswith("base_encoder.")}
    assert [name for name, p in base.items() if not p.requires_grad] == facts["no_grad_base_params"]
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    assert sum(p.numel() for p in base.values()) == facts["n_params_base_encoder"]
    assert sum(p.numel() for p in model.predictor.parameters()) == facts["n_params_predictor"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == facts["n_params_trainable"]


def test_forward_is_the_composition_of_its_parts():
    case = cases.load("moco_step")[0]["case"]
    loss = cases.build(case)(*cases.views(case), momentum=case["m"])
    assert loss.item() == pytest.approx(cases.load("moco_step")[0]["f64"]["loss"], rel=1e-12)


@pytest.mark.parametrize("golden", cases.load("units")["ema"], ids=lambda golden: f"m{golden['m']}")
def test_momentum_update(golden):
    model = tiny().double()
    base, momentum = model.base_encoder.norm.bias, model.momentum_encoder.norm.bias
    with torch.no_grad():
        base[:6] = torch.tensor(golden["base"], dtype=torch.float64)
        momentum[:6] = torch.tensor(golden["momentum"], dtype=torch.float64)
    running = model.momentum_encoder.head[1].running_mean.fill_(3.0)
    after = []
    for _ in golden["after"]:
        model.update_momentum(golden["m"])
        after.append(momentum[:6].tolist())
    assert_close({"after": after}, golden)
    assert running.eq(3).all()
    frozen = (model.base_encoder.pos_embed, model.momentum_encoder.pos_embed)
    assert torch.equal(*frozen)


def test_the_momentum_encoder_starts_as_a_copy_that_shares_nothing():
    model = tiny()
    pairs = list(zip(model.base_encoder.parameters(), model.momentum_encoder.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


@pytest.mark.parametrize(("arch", "dtype"), [("vit_small", torch.float32), ("vit_conv_small", torch.float64)])
def test_uint8_images_are_normalised_inside(arch, dtype):
    model = tiny(arch).to(dtype)
    x1, x2 = uint8_images(seed=1), uint8_images(seed=2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # As torchvision's ToTensor and Normalize would: divided by 255 first, then standardised.
    y1, y2 = (((x.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).to(dtype) for x in (x1, x2))
    normalised = model.normalize(x1)
    assert normalised.dtype == dtype
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalised, y1, rtol=0, atol=2e-6)
    outputs = [(*model.queries(a, b), *model.keys(a, b), model.features(a)) for a, b in ((x1, x2), (y1, y2))]
    for from_uint8, from_float in zip(*outputs, strict=True):
        torch.testing.assert_close(from_uint8, from_float, rtol=1e-3, atol=1e-3)


def test_each_view_is_its_own_batch_to_batch_norm():
    model = tiny()
    x1, x2 = (model.normalize(uint8_images(seed=seed)) for seed in (1, 2))
    q1, q2 = model.queries(x1, x2)
    assert int(model.predictor[1].num_batches_tracked) == 2
    together = model.predictor(model.base_encoder(torch.cat([x1, x2])))
    assert not torch.allclose(torch.cat([q1, q2]), together, atol=1e-2)


@pytest.mark.parametrize(("arch", "passes"), [("vit_small", 1), ("vit_conv_small", 2)])
def test_both_views_pass_at_once_where_that_gives_the_same(arch, passes):
    model = tiny(arch).double()
    x1, x2 = (model.normalize(uint8_images(seed=seed)) for seed in (1, 2))
    apart = copy.deepcopy(model)
    apart.one_pass = False
    ran: list[int] = []
    model.base_encoder.get_submodule("norm").register_forward_hook(lambda *_: ran.append(1))
    for each in (model, apart):
        each(x1, x2, momentum=0.9).backward()
    assert len(ran) == passes
    for ours, theirs in zip(model.parameters(), apart.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-14)


def test_keys_have_no_gradient_and_own_batch_statistics():
    model = tiny()
    k1, k2 = model.keys(uint8_images(seed=1), uint8_images(seed=2))
    assert not k1.requires_grad
    assert not k2.requires_grad
    assert int(model.momentum_encoder.head[1].num_batches_tracked) == 2
    assert int(model.base_encoder.head[1].num_batches_tracked) == 0


def test_features_do_not_depend_on_the_batch_in_eval_mode():
    model = tiny("vit_conv_small")
    x = uint8_images(n=6)
    assert not torch.allclose(model.features(x)[:2], model.features(x[:2]), atol=1e-4)
    model.eval()
    features = model.features(x)
    assert features.shape == (6, model.feature_dim)
    torch.testing.assert_close(features[:2], model.features(x[:2]), rtol=1e-4, atol=1e-5)


def test_backbone_state_fits_the_plain_model():
    from timm.models.vision_transformer import VisionTransformer

    model = tiny().eval()
    plain = VisionTransformer(img_size=32, num_classes=0, **TINY).eval()
    plain.load_state_dict(model.backbone_state_dict())
    x = model.normalize(uint8_images())
    torch.testing.assert_close(plain(x), model.features(x))


def test_state_dict_round_trip():
    saved = tiny()
    saved(uint8_images(seed=1), uint8_images(seed=2), 0.9)
    torch.manual_seed(1)
    other = MoCoV3.build("vit_small", dim=16, mlp_dim=32, image_size=32, backbone=TINY)
    other.load_state_dict(saved.state_dict())
    x = uint8_images(seed=1), uint8_images(seed=2)
    assert torch.equal(saved(*x, 0.9), other(*x, 0.9))
    assert {name.split(".")[0] for name in saved.state_dict()} == {"base_encoder", "momentum_encoder", "predictor"}


def test_keys_are_exchanged_while_the_queries_are_computed(monkeypatch):
    model, order = tiny(), []

    def noted(name, function):
        def call(*args):
            order.append(name)
            return function(*args)

        return call

    monkeypatch.setattr("model.moco.start_gather", noted("start", collectives.start_gather))
    monkeypatch.setattr("model.contrastive.finish", noted("finish", collectives.finish))
    monkeypatch.setattr(model, "encode", noted("queries", model.encode))
    model(uint8_images(seed=1), uint8_images(seed=2), 0.9)
    assert order == ["start", "start", "queries", "finish", "finish"]


def test_autocast_leaves_the_loss_in_float32():
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = model.queries(uint8_images(seed=1), uint8_images(seed=2))
        loss = model.loss(q, model.keys(uint8_images(seed=1), uint8_images(seed=2)))
    assert q[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
