"""A run goes out as weight files that other programs load strictly and that give the same features."""

import functools
import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from model import LARS
from model.official import load_official
from trainer import checkpoint
from trainer.config import Config, replace
from trainer.engine import build_model, build_optimizer
from trainer.export import description, export, main, open_run

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 4}
CASES: dict[str, dict[str, Any]] = {
    "vit_small": SIZES,
    "vit_conv_small": SIZES,
    "resnet18": {"optimizer": "lars"},
    "swin_tiny_patch4_window7_224": {"image_size": 224},
    "test_efficientnet": {},
    "vit_tiny_patch16_224": SIZES,
}
IN_DEFAULT = ("vit_small", "vit_conv_small", "resnet18", "test_efficientnet", "vit_tiny_patch16_224")
ARCHS = [pytest.param(arch, marks=[] if arch in IN_DEFAULT else pytest.mark.slow) for arch in CASES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of that architecture after two steps, with batch statistics that are not the initial ones."""

    @functools.cache
    def make(arch):
        flags = {"image_size": 32, "moco_dim": 16, "moco_mlp_dim": 32, "optimizer": "adamw", **CASES[arch]}
        config = replace(Config(), arch=arch, amp="off", stop_grad_conv1=True, **flags)
        folder = tmp_path_factory.mktemp("runs") / arch
        folder.mkdir()
        model = build_model(config)
        optimizer = build_optimizer(config, model)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        size = config.data.image_size
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3, size, size), torch.randn(4, 3, size, size), momentum=0.9).backward()
            optimizer.step()
        state = {
            "step": 2,
            "flags": config.flags(),
            "fingerprint": "0",
            "seconds": 0.0,
            "notes": {},
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": {},
            "loader": {"epoch": 1, "step": 1, "global_batch": 4, "failed": []},
        }
        checkpoint.save(folder, state, keep=0)
        (folder / "config.json").write_text(json.dumps({"flags": config.flags(), "fingerprint": "0"}))
        return folder

    return make


def loaded(file, monkeypatch):
    """The model that the lines in FILE.json give, as a user would run them."""
    monkeypatch.chdir(file.parent)
    about = json.loads((file.parent / f"{file.name}.json").read_text())
    names: dict[str, object] = {}
    exec("\n".join(about["load"]), names)
    return names["model"], about


@pytest.mark.parametrize("form", ["timm", "official", "deit"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_lines_beside_the_file_load_it_strictly_and_give_the_same_features(
    arch, form, trained, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "weights"
    code = main(["--run", str(trained(arch)), "--out", str(file), "--format", form])
    if form == "official" and arch not in ("vit_small", "vit_conv_small", "resnet18"):
        assert code == 2
        assert f"the reference has no {arch}" in capsys.readouterr().err
        return
    assert code == 0
    model, about = loaded(file, monkeypatch)
    source = open_run(trained(arch)).model.eval()
    size = about["image_size"]
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), source.features(images), rtol=1e-6, atol=1e-6)
    mine = source.backbone_state_dict()
    assert list(mine) == list(model.state_dict())
    assert all(torch.equal(value, mine[name]) for name, value in model.state_dict().items())
    assert (about["arch"], about["step"], about["epochs"], about["run"]) == (arch, 2, 1, str(trained(arch)))
    assert about["mean"] == [0.485, 0.456, 0.406]
    if about["constructor"] == "timm.create_model":  # what tells timm's users how to prepare images
        told = timm.data.resolve_model_data_config(model)
        assert (told["mean"], told["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (told["input_size"], told["crop_pct"], told["interpolation"]) == ((3, size, size), 0.875, "bilinear")
    if arch.startswith("vit"):
        assert about["heads"] == 4
        assert ("note" in about) == (form == "official" or "conv" in arch)


def test_the_heads_of_vit_small_are_said_as_timm_has_others(trained, tmp_path):
    """With timm's 6 heads the weights would load as well, and give wrong features."""
    source = open_run(trained("vit_small"))
    about = export(source, tmp_path / "a.safetensors", "timm")
    assert about["constructor"] == "timm.create_model"
    assert about["arguments"].items() >= {"model_name": "vit_small_patch16_224", "img_size": 32, **SIZES}.items()


def test_heads_that_the_reference_does_not_have_are_noted(trained):
    source = open_run(trained("resnet18"))
    within = "saved within epoch 1: a run that goes on from it takes the epoch's first 1 steps again"
    assert description(source, "official", "file")["note"] == within
    source.state["loader"]["step"] = 0
    assert "note" not in description(source, "official", "file")
    source.model.heads = "vit"
    assert "other sizes or heads" in description(source, "official", "file")["note"]


@pytest.mark.parametrize("arch", ["vit_small", "resnet18"])
def test_the_official_file_holds_the_whole_run(arch, trained, tmp_path):
    source = open_run(trained(arch))
    export(source, tmp_path / "checkpoint_0000.pth.tar", "official")
    found = load_official(tmp_path / "checkpoint_0000.pth.tar")
    assert found.num_heads == (4 if arch.startswith("vit_") else None)
    assert (found.arch, found.epoch) == (arch, 1)
    assert all(torch.equal(value, found.state_dict[name]) for name, value in source.state["model"].items())
    assert list(found.state_dict) == list(source.state["model"])

    # As the reference does: one optimizer over all parameters, frozen ones too, and a scaler that is switched on.
    model = build_model(source.config, sync_bn=False)
    everything = list(model.parameters())
    optimizer = LARS(everything, lr=1.0) if arch == "resnet18" else torch.optim.AdamW(everything)
    assert found.optimizer is not None
    optimizer.load_state_dict(found.optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(everything)
    trained_only = [parameter for parameter in everything if parameter.requires_grad]
    assert len(trained_only) < len(everything)
    assert optimizer.state.keys() == set(trained_only)
    for place, state in source.state["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(optimizer.state[trained_only[place]][key], value), (place, key)
    scaler = torch.amp.GradScaler("cpu")
    assert found.scaler is not None
    scaler.load_state_dict(found.scaler)
    assert scaler.get_scale() == 65536.0


def test_a_run_of_the_real_command_goes_out(train, tmp_path, monkeypatch, capsys):
    assert train("--no-knn", "--max-steps", 4) == 0
    file = tmp_path / "demo.safetensors"
    assert main(["--run", str(tmp_path / "run"), "--out", str(file)]) == 0
    assert "vit_conv_small after 4 steps (1 epochs)" in capsys.readouterr().out
    _, about = loaded(file, monkeypatch)
    assert about["step"] == 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["demo.safetensors", "demo.safetensors.json", "run"]


def test_weights_that_share_memory_go_out_each_by_itself(trained, tmp_path, monkeypatch):
    """As in timm's coat_tiny; safetensors refuses them."""
    source, shared = open_run(trained("vit_small")), torch.randn(2, 3)
    monkeypatch.setattr(type(source.model), "backbone_state_dict", lambda _: {"a": shared, "b": shared, "c": shared.T})
    export(source, tmp_path / "a", "timm")
    saved = load_file(tmp_path / "a")
    assert all(torch.equal(value, {"c": shared.T}.get(name, shared)) for name, value in saved.items())
    assert list(saved) == ["a", "b", "c"]


def test_float64_stays_float64(train, tmp_path):
    assert train("--no-knn", "--max-steps", 1, "--dtype", "float64") == 0
    source = open_run(tmp_path / "run")
    export(source, tmp_path / "a", "timm")
    saved = load_file(tmp_path / "a")
    assert saved["blocks.0.mlp.fc1.weight"].dtype == torch.float64
    for name, value in saved.items():
        assert torch.equal(value, source.state["model"][f"base_encoder.{name}"]), name


def test_everybody_may_read_the_files(trained, tmp_path):
    for form in ("timm", "official"):
        (tmp_path / form).mkdir()
        export(open_run(trained("vit_small")), tmp_path / form / "a", form)
        modes = {file.stat().st_mode for file in (tmp_path / form).iterdir()}
        assert modes == {(trained("vit_small") / "config.json").stat().st_mode}


def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_named(train, tmp_path, capsys):
    assert train("--no-knn", "--max-steps", 1) == 0
    (tmp_path / "run" / "checkpoint_00000002.pt").write_bytes(b"rubbish")
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint_00000002.pt cannot be read" in printed
    assert "after 1 steps" in printed


@pytest.fixture
def refused(tmp_path, capsys):
    """Check that a command is refused with one line and changes nothing; returns the line."""

    def call(*flags):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert main([str(flag) for flag in flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
        return line

    return call


def test_what_is_no_run_is_refused(refused, tmp_path):
    assert "nowhere: no such folder" in refused("--run", tmp_path / "nowhere", "--out", tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused("--run", tmp_path / "empty", "--out", tmp_path / "a")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    assert "thesis holds no run" in refused("--run", tmp_path / "thesis", "--out", tmp_path / "a")
    (tmp_path / "empty" / "config.json").write_text('{"flags": {}}')
    assert "has no checkpoint yet" in refused("--run", tmp_path / "empty", "--out", tmp_path / "a")
    (tmp_path / "empty" / "checkpoint_00000001.pt").write_bytes(b"rubbish")
    line = refused("--run", tmp_path / "empty", "--out", tmp_path / "a")
    assert "is whole" in line
    assert "another --out" not in line
    assert "File name too long" in refused("--run", tmp_path / ("n" * 300), "--out", tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda state: state["flags"].update(arch="vit_of_tomorrow"), "vit_of_tomorrow"),
        (lambda state: state["flags"].update(flag_of_tomorrow=1), "flag_of_tomorrow"),
        (lambda state: state["model"].popitem(), "Missing key"),
    ],
    ids=["arch", "flag", "weights"],
)
def test_a_run_of_another_installation_is_one_line(change, phrase, refused, trained, tmp_path):
    state = checkpoint.load(trained("vit_small") / "checkpoint_00000002.pt")
    change(state)
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", state, keep=0)
    (tmp_path / "run" / "config.json").write_text("{}")
    line = refused("--run", tmp_path / "run", "--out", tmp_path / "a")
    assert "checkpoint_00000002.pt does not fit what is installed here" in line
    assert phrase in line


def test_half_a_result_does_not_stay(refused, trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.export.write_atomically", full)
        assert "No space left" in refused("--run", trained("vit_small"), "--out", tmp_path / "a")
    assert main(["--run", str(trained("vit_small")), "--out", str(tmp_path / "a")]) == 0


@pytest.mark.parametrize("existing", ["a", "a.json"])
@pytest.mark.parametrize("form", ["timm", "official", "deit"])
def test_nothing_is_overwritten(existing, form, refused, trained, tmp_path):
    (tmp_path / existing).write_text("precious")
    line = refused("--run", trained("vit_small"), "--out", tmp_path / "a", "--format", form)
    assert f"{tmp_path / existing} is there already" in line


@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_a_folder_is_no_output(folder, refused, trained):
    assert f"--out {folder} is a folder; name a file" in refused("--run", trained("vit_small"), "--out", folder)


def test_an_output_folder_that_is_missing_is_named(refused, trained, tmp_path):
    assert "there is no folder" in refused("--run", trained("vit_small"), "--out", tmp_path / "no" / "a")
