import pytest
import torch

from model import LARS, MoCoV3
from model.official import (
    from_official,
    load_official,
    optimizer_from_official,
    optimizer_to_official,
    to_official,
)
from tests.golden import cases, formula
from tests.golden.cases import load
from tests.golden.compare import assert_close
from tests.golden.official_file import official_file, optimizer_state, structure

STRUCTURES = [
    pytest.param(tag, marks=[] if tag in ("tiny", "resnet18_small") else pytest.mark.slow)
    for tag in load("checkpoint_structure")
]


def model_of(case):
    overrides = {key: case[key] for key in ("embed_dim", "depth", "num_heads") if key in case}
    return MoCoV3.build(
        case["arch"].replace("custom_vit", "vit_small"),
        dim=case.get("dim", 256),
        mlp_dim=case.get("mlp_dim", 4096),
        stop_grad_conv1=case.get("stop_grad_conv1", False),
        image_size=case["img"],
        backbone=overrides,
    )


@pytest.mark.parametrize("tag", STRUCTURES)
def test_names_shapes_and_order_are_the_references(tag):
    golden, case = structure(tag)
    model = model_of(case)
    official = to_official(model.state_dict())
    dtypes = {name: str(value.dtype) for name, value in official.items()}
    assert [[name, list(value.shape)] for name, value in official.items()] == [e[:2] for e in golden["state_dict"]]
    assert [dtypes[name].removeprefix("torch.") for name in dtypes] == [
        e[2].removeprefix("torch.") for e in golden["state_dict"]
    ]
    assert list(from_official(official)) == list(model.state_dict())
    order = ["module." + name for name, _ in model.named_parameters()]
    assert order == golden["optimizer"]["params_in_index_order"]
    trained = [index for index, p in enumerate(model.parameters()) if p.requires_grad]
    assert trained == golden["optimizer"]["indices_with_state"]
    assert list(model.backbone_state_dict()) == golden["converted_backbone_keys"]


@pytest.mark.parametrize("tag", STRUCTURES)
def test_an_official_file_goes_into_model_and_optimizer(tag, tmp_path):
    golden, case = structure(tag)
    checkpoint = load_official(official_file(golden, tmp_path / "checkpoint_0006.pth.tar"))
    assert (checkpoint.arch, checkpoint.epoch) == (case["arch"], 7)
    assert checkpoint.scaler == golden["scaler_state"]
    model = model_of(case)
    model.load_state_dict(checkpoint.state_dict)

    optimizer = (
        LARS(model.parameters(), lr=1.0) if case["optimizer"] == "lars" else torch.optim.AdamW(model.parameters())
    )
    assert checkpoint.optimizer is not None
    optimizer.load_state_dict(checkpoint.optimizer)
    parameters = dict(model.named_parameters())
    for index in golden["optimizer"]["indices_with_state"]:
        name = golden["optimizer"]["params_in_index_order"][index]
        parameter = parameters[name.removeprefix("module.")]
        for key, value in optimizer_state(golden, name, parameter.shape).items():
            assert torch.equal(optimizer.state[parameter][key], value), (name, key)

    again = to_official(model.state_dict())
    assert all(torch.equal(again["module." + name], value) for name, value in checkpoint.state_dict.items())


@pytest.mark.parametrize(("tag", "features"), [("tiny", "f-tiny"), ("resnet18_small", "f-r18")])
def test_a_loaded_backbone_gives_the_references_features(tag, features, tmp_path):
    golden, case = structure(tag)
    expected = next(g for g in load("features") if g["case"]["tag"] == features)
    checkpoint = load_official(official_file(golden, tmp_path / "file", optimizer=False, scaler=False))
    assert checkpoint.optimizer is None
    assert checkpoint.scaler is None
    model = model_of(case)
    model.load_state_dict(checkpoint.state_dict)
    # The features golden has untouched running statistics; those of the file are filled.
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.zero_()
        elif name.endswith("running_var"):
            buffer.fill_(1)
    x, _ = cases.views(expected["case"])
    with torch.no_grad():
        mine = {"eval": formula.digest(model.double().eval().features(x))}
    assert_close(mine, expected["f64"])


def test_a_fused_optimizer_goes_on_as_a_plain_one_also_with_kernels_in_channels_last():
    """The reference's state is contiguous, our kernels are not; the fused AdamW reads both as if laid out alike."""
    values = {key: torch.rand(8, 3, 3, 3) for key in ("parameter", "gradient", "exp_avg", "exp_avg_sq")}

    def stepped(layout, **options):
        convolution = torch.nn.Conv2d(3, 8, 3, bias=False).to(memory_format=layout)
        convolution.weight.data.copy_(values["parameter"])
        convolution.weight.grad = torch.empty_like(convolution.weight).copy_(values["gradient"])
        optimizer = torch.optim.AdamW(convolution.parameters(), lr=0.1, **options)
        moments = {key: values[key].clone() for key in ("exp_avg", "exp_avg_sq")}
        group = {**optimizer.state_dict()["param_groups"][0], "params": [0]}
        official = {"state": {0: {"step": 3, **moments}}, "param_groups": [group]}
        optimizer.load_state_dict(optimizer_from_official(official, convolution))
        optimizer.step()
        again = optimizer_to_official(optimizer.state_dict(), convolution)["state"][0]
        assert again["exp_avg"].is_contiguous()
        return convolution.weight.detach(), again["exp_avg"]

    plain = stepped(torch.contiguous_format)
    torch.testing.assert_close(stepped(torch.channels_last, fused=True), plain, rtol=1e-5, atol=1e-6)


def test_names_come_with_and_without_module():
    state = model_of(structure("tiny")[1]).state_dict()
    assert list(from_official(state)) == list(from_official(to_official(state))) == list(state)
    assert list(to_official(to_official(state))) == list(to_official(state))


def probe():
    return {"module.patch_embed.proj.weight": torch.zeros(1), "module.head.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 90, "arch": "vit_small", "state_dict": probe(), "best_acc1": 73.2}, "a linear probe saves them"),
        ({"model": {"cls_token": torch.zeros(1)}}, "a backbone in DeiT's format"),
        ({"step": 3, "weights": {}}, "a dict of step, weights"),
        ({}, "a dict of nothing"),
        ([1, 2], "a list"),
        ({"epoch": 1, "state_dict": {"module.encoder_q.conv1.weight": 0}}, "foreign name encoder_q.conv1.weight"),
        ({"epoch": 1, "state_dict": {"base_encoder.conv1.weight": 0}}, "without momentum_encoder and predictor"),
        (
            {"state_dict": {f"{part}.0.weight": 0 for part in ("base_encoder", "momentum_encoder", "predictor")}},
            "without arch and epoch",
        ),
    ],
)
def test_other_files_are_refused_by_what_they_are(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pth.tar")
    with pytest.raises(ValueError, match=rf"file\.pth\.tar: .*{message}"):
        load_official(tmp_path / "file.pth.tar")


@pytest.mark.parametrize("content", [b"", b"hello, this is rubbish", b"PK\x03\x04cut off", b'{"epoch": 3}'])
def test_rubbish_is_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file: not a PyTorch file of tensors and plain values"):
        load_official(tmp_path / "file")


def test_code_in_a_file_is_not_executed(tmp_path):
    torch.save({"state_dict": {}, "hook": Touch(tmp_path / "touched")}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"not opened, as it holds code, .*open"):
        load_official(tmp_path / "file")
    assert not (tmp_path / "touched").exists()


class Touch:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "nowhere.pth.tar")
