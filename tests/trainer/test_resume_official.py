"""A run of the reference release goes on here: its file comes in, trains and goes out with the reference's numbers."""

import json
from pathlib import Path

import pytest
import torch

from dali_pipes import MOCO_V3, DatasetIndex, ViewLoader
from model import learning_rate, momentum_coefficient
from model.official import load_official, to_official
from tests.golden import cases, formula
from tests.golden.compare import assert_close
from tests.golden.official_file import official_file, optimizer_state, structure
from trainer import checkpoint, resume
from trainer.config import Config, ConfigError, parse, replace
from trainer.distributed import World
from trainer.engine import Engine, build_model
from trainer.export import TrainedRun, official_checkpoint
from trainer.metrics import read_metrics


def config_of(case, **flags):
    sizes = {key: case[key] for key in ("embed_dim", "depth", "num_heads") if key in case}
    return replace(
        Config(),
        arch=case["arch"].replace("custom_vit", "vit_small"),
        image_size=case["img"],
        moco_dim=case["dim"],
        moco_mlp_dim=case["mlp_dim"],
        moco_t=case.get("T", 1.0),
        stop_grad_conv1=case.get("stop_grad_conv1", False),
        optimizer=case.get("optimizer", "lars"),
        weight_decay=case.get("wd", 1e-6),
        batch_size=8,
        amp="off",
        compile="off",
        dtype="float64",
        **sizes,
        **flags,
    )


def engine_from(file, config, sample):
    """A fresh engine that goes on from that file, as train_ddp.py does."""
    index = DatasetIndex.scan(sample / "train")
    model = build_model(config, sync_bn=False)
    resume.check(file, config, index.fingerprint, model)
    engine = Engine(config, World(), torch.device("cpu"), index, model, threads=1)
    engine.load_state_dict(resume.start(file, engine))
    return engine


def write_out(engine, file):
    run = TrainedRun(Path(), Path(), engine.config, engine.model, engine.state_dict(), [])
    torch.save(official_checkpoint(run), file)
    return file


def named(name, tag):
    return next(golden for golden in cases.load(name) if golden["case"]["tag"] == tag)


@pytest.mark.parametrize(
    ("tag", "features", "step"), [("tiny", "f-tiny", "s-tiny"), ("resnet18_small", "f-r18", "s-r18")]
)
def test_in_one_step_out_each_as_the_reference_has_it(tag, features, step, sample, tmp_path):
    features, step = named("features", features), named("moco_step", step)
    case, expected = step["case"], step["f64"]
    file = official_file(structure(tag)[0], tmp_path / "in.pth.tar", optimizer=False, buffers=False)
    engine = engine_from(file, config_of(case), sample)
    model = engine.model

    with torch.no_grad():
        images, _ = cases.views(features["case"])
        assert_close({"eval": formula.digest(model.eval().features(images))}, features["f64"])

    loss = model.train()(*cases.views(case), momentum=case["m"])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mine = {"loss": loss.item(), "grad": cases.digests(gradients, expected["grad"])}
    assert_close(mine, expected)

    out = load_official(write_out(engine, tmp_path / "out.pth.tar"))
    statistics: dict[str, dict[str, object]] = {name: {} for name in expected["bn_after"]}
    for name, found in statistics.items():
        for key in ("running_mean", "running_var"):
            found[key] = formula.digest(out.state_dict[name + key])
        found["num_batches_tracked"] = int(out.state_dict[name + "num_batches_tracked"])
    momentum = cases.digests(out.state_dict, expected["momentum_after"])
    assert_close({"momentum_after": momentum, "bn_after": statistics}, expected)
    assert out.epoch == 7


def steps_through_files(case, config, sample, folder):
    """Three steps, each by an engine of its own that has nothing but the file of the one before."""
    folder.mkdir()
    start = {"epoch": 1, "arch": config.model.arch, "state_dict": to_official(cases.build(start_of(case)).state_dict())}
    torch.save(start, folder / "0")
    losses = []
    for step in range(3):
        engine = engine_from(folder / str(step), config, sample)
        losses.append(one_step(engine.model, engine.optimizer, case, step))
        write_out(engine, folder / str(step + 1))
    return losses, load_official(folder / "3"), engine


def start_of(case):
    return {**case, "momentum_init": "copy"}


def one_step(model, optimizer, case, step):
    for group in optimizer.param_groups:
        group["lr"] = case["lr"]
    loss = model(*cases.views(case, f"|{step}"), momentum=case["m"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("tag", ["o-tiny-adamw", "o-tiny-lars", "o-r18-lars"])
def test_three_steps_through_files_are_the_references(tag, sample, tmp_path):
    golden = named("optim_steps", tag)
    case, expected = golden["case"], golden["f64"]
    losses, out, engine = steps_through_files(case, config_of(case), sample, tmp_path / "files")
    places = {name: place for place, (name, _) in enumerate(engine.model.named_parameters())}
    assert out.optimizer is not None
    states = {name: out.optimizer["state"].get(places[name], {}) for name in expected["opt_state"]}
    mine = {
        "losses": losses,
        "params": cases.digests(out.state_dict, expected["params"]),
        "momentum_params": cases.digests(out.state_dict, expected["momentum_params"]),
        "opt_state": {
            name: {key: formula.digest(value) if value.ndim else value.item() for key, value in state.items()}
            for name, state in states.items()
        },
    }
    assert_close(mine, expected)


@pytest.mark.slow
def test_adamw_on_a_resnet_through_files_is_the_run_without_them(sample, tmp_path):
    case = {**named("optim_steps", "o-r18-lars")["case"], "optimizer": "adamw", "lr": 1e-3, "wd": 0.1}
    losses, out, _ = steps_through_files(case, config_of(case), sample, tmp_path / "files")
    model = cases.build(start_of(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    assert losses == [one_step(model, optimizer, case, step) for step in range(3)]
    assert all(torch.equal(value, out.state_dict[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tag", ["tiny", "resnet18_small"])
@pytest.mark.parametrize("prefix", [True, False])
def test_in_and_out_again_is_the_same_file(tag, prefix, sample, tmp_path):
    golden, case = structure(tag)
    theirs = torch.load(official_file(golden, tmp_path / "in.pth.tar"))
    if not prefix:
        theirs["state_dict"] = {name.removeprefix("module."): x for name, x in theirs["state_dict"].items()}
        torch.save(theirs, tmp_path / "in.pth.tar")
    config = replace(config_of({**case, "wd": 0.1}), dtype="float32")
    ours = torch.load(write_out(engine_from(tmp_path / "in.pth.tar", config, sample), tmp_path / "out.pth.tar"))
    assert (ours["epoch"], ours["scaler"]) == (7, theirs["scaler"])
    assert list(ours["state_dict"]) == [entry[0] for entry in golden["state_dict"]]
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][f"module.{name.removeprefix('module.')}"], value), name
    state = ours["optimizer"]["state"]
    assert state.keys() == theirs["optimizer"]["state"].keys()
    for place, entry in theirs["optimizer"]["state"].items():
        assert all(torch.equal(state[place][key], value) for key, value in entry.items())
    (group,), (their_group,) = ours["optimizer"]["param_groups"], theirs["optimizer"]["param_groups"]
    settings = their_group.keys() - {"lr", "params"}  # the reference sets the rate before every step
    assert {key: group[key] for key in settings} == {key: their_group[key] for key in settings}
    assert group["params"] == their_group["params"]


FLAGS = (
    "--arch vit_small --image-size 64 --embed-dim 64 --depth 2 --num-heads 4 --moco-dim 32 --moco-mlp-dim 96 --no-knn "
    "--stop-grad-conv1 --optimizer adamw --weight-decay 0.1 --batch-size 8 --epochs 9"
).split()


@pytest.fixture
def published(tmp_path):
    """Write a file of the tiny golden model; the flags of `official_file`."""

    def write(**options):
        return official_file(structure("tiny")[0], tmp_path / "checkpoint_0006.pth.tar", **options)

    return write


@pytest.mark.parametrize("old", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_goes_on_at_the_start_of_the_epoch(old, published, train, sample, tmp_path, capsys):
    file = published(old=old)
    assert train(*FLAGS, "--resume", file, "--max-steps", 7 * 6 + 1) == 0
    assert "custom_vit of the reference release after 7 epochs" in capsys.readouterr().out
    (row,) = read_metrics(tmp_path / "run")
    assert (row["step"], row["epoch"]) == (43, 7)  # 50 images: six batches of 8 an epoch

    # The same step by hand: the file's weights and optimizer state, the views of epoch 7, the schedules at 7 / 9.
    config = replace(Config(), **json.loads((tmp_path / "run" / "config.json").read_text())["flags"])
    model, official = build_model(config, sync_bn=False), load_official(file)
    model.load_state_dict(official.state_dict)
    model.to(memory_format=torch.channels_last)
    lr = learning_rate(7.0, peak=config.optim.lr * 8 / 256, epochs=9, warmup_epochs=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    golden, places = structure("tiny")[0], list(model.parameters())
    for index in golden["optimizer"]["indices_with_state"]:
        name = golden["optimizer"]["params_in_index_order"][index]
        optimizer.state[places[index]] = optimizer_state(golden, name, places[index].shape)
    loader = ViewLoader(
        DatasetIndex.scan(sample / "train"), MOCO_V3.with_crop_min(0.2), batch_size=8, image_size=64, num_threads=1
    )
    loader.set_epoch(7)
    views = next(iter(loader)).views
    loss = model(*views, momentum=momentum_coefficient(7.0, start=0.99, epochs=9))
    loss.backward()
    optimizer.step()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    found = checkpoint.load(tmp_path / "run" / "checkpoint_00000043.pt")
    torch.testing.assert_close(found["model"], model.state_dict(), rtol=1e-5, atol=1e-7)
    assert found["optimizer"]["state"][0]["step"] == 4

    assert train(*FLAGS, "--resume", file, "--max-steps", 7 * 6 + 2) == 0  # and once more, from its own checkpoint
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [43, 44]


def test_a_published_file_starts_its_optimizer_afresh_and_says_so(published, train, tmp_path, capsys):
    file = published(optimizer=False, scaler=False)
    assert train(*FLAGS, "--resume", file, "--max-steps", 43, "--amp", "fp16") == 0
    assert "it has no optimizer and no scaler state: that starts afresh" in capsys.readouterr().out
    found = checkpoint.load(tmp_path / "run" / "checkpoint_00000043.pt")
    assert found["optimizer"]["state"][0]["step"] == 1


def test_the_loss_scale_goes_on(published, train, tmp_path):
    file = published()
    content = torch.load(file)
    content["scaler"]["scale"] = 1024.0
    torch.save(content, file)
    assert train(*FLAGS, "--resume", file, "--max-steps", 43, "--amp", "fp16") == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint_00000043.pt")["scaler"]["scale"] == 1024.0


@pytest.fixture
def refused(published):
    """Check that a file is refused for these flags; returns the line."""

    def call(*flags, file=None):
        config = parse(["demo", *FLAGS, *flags, "--data", "images", "--out", "run"])
        with pytest.raises(ConfigError) as error:
            resume.check(file or published(), config, "0", build_model(config))
        return str(error.value)

    return call


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        ("--arch vit_conv_small", "--arch is vit_small there, vit_conv_small here"),
        ("--arch resnet18 --embed-dim None --depth None --num-heads None", "--arch is vit_small there, resnet18 here"),
        (
            "--arch vit_tiny_patch16_224 --embed-dim None --depth None --num-heads None",
            "--arch is vit_small there, vit_tiny_patch16_224 here",
        ),
        ("--depth 1 --embed-dim 32", "--embed-dim is 64 there, 32 here; --depth is 2 there, 1 here"),
        ("--image-size 32", "--image-size is 64 there, 32 here"),
        ("--moco-dim 16", "--moco-dim is 32 there, 16 here"),
        ("--moco-mlp-dim 32", "--moco-mlp-dim is 96 there, 32 here"),
        ("--heads resnet", "--heads is vit there, resnet here"),
        ("--no-stop-grad-conv1", "base_encoder.patch_embed.proj.weight is trained here, not there; see --stop-grad-co"),
        ("--optimizer lars", "--optimizer is adamw there, lars here"),
        ("--weight-decay 0.05", "--weight-decay is 0.1 there, 0.05 here"),
        ("--epochs 7", "has all of --epochs 7 behind it"),
    ],
)
def test_what_does_not_fit_is_said_with_the_flag_that_would(flags, phrase, refused):
    line = refused(*flags.split())
    assert phrase in line
    assert "epoch 7 of a custom_vit of the reference release" in line


def test_the_nearest_architecture_is_named(refused, tmp_path):
    shapes = structure("resnet50")[0]["state_dict"]
    state = {name: torch.zeros(()).expand(shape) for name, shape, _ in shapes}
    torch.save({"epoch": 7, "arch": "renamed", "state_dict": state}, tmp_path / "file.pth.tar")
    sizes = "--embed-dim None --depth None --num-heads None"
    line = refused(*f"--arch resnet18 {sizes}".split(), file=tmp_path / "file.pth.tar")
    assert "--arch is resnet50 there, resnet18 here" in line


@pytest.mark.slow
def test_attention_heads_do_not_show_in_weights_and_are_checked_all_the_same(train, tmp_path, capsys):
    shapes = structure("vit_small")[0]["state_dict"]
    state = {name: torch.zeros(()).expand(shape) for name, shape, _ in shapes}
    torch.save({"epoch": 7, "arch": "vit_small", "state_dict": state}, tmp_path / "file.pth.tar")
    flags = (
        "--arch vit_small --image-size 224 --embed-dim None --depth None --moco-dim 256 --moco-mlp-dim 4096 --no-knn"
    )
    for heads, code in (("6", 2), ("None", 2)):
        assert train(*flags.split(), "--no-knn", "--num-heads", heads, "--resume", tmp_path / "file.pth.tar") == code
        line = capsys.readouterr().err.strip()
        assert ("--num-heads is 12 there, 6 here" in line) == (heads == "6")


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ({"epoch": 90, "arch": "vit_small", "state_dict": {"module.head.weight": torch.ones(2)}}, "a linear probe"),
        ({"model": {"cls_token": torch.zeros(1)}}, "a backbone in DeiT's format"),
        ({"model": {}, "args": Path("x")}, "not opened, as it holds code, pathlib"),
    ],
)
def test_other_files_are_told_apart(content, phrase, refused, tmp_path):
    torch.save(content, tmp_path / "file.pth.tar")
    assert phrase in refused(file=tmp_path / "file.pth.tar")


@pytest.mark.parametrize(
    ("part", "content", "phrase"),
    [
        ("optimizer", {"state": {}}, "its optimizer state is damaged"),
        ("optimizer", {"state": {0: {"exp_avg": "x"}}, "param_groups": [{}]}, "its optimizer state is damaged"),
        ("optimizer", [1, 2], "its optimizer state is damaged"),
        (
            "optimizer",
            {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{}]},
            "its optimizer state is damaged",
        ),
        ("epoch", "seven", "its epoch is damaged"),
        ("arch", 3, "its arch is damaged"),
        ("scaler", 65536.0, "its scaler is damaged"),
    ],
)
def test_a_damaged_part_is_said(part, content, phrase, refused, published):
    file = published()
    torch.save({**torch.load(file), part: content}, file)
    assert phrase in refused(file=file)


def test_state_of_a_parameter_that_is_not_there_is_said(refused, published):
    file = published()
    content = torch.load(file)
    content["optimizer"]["state"][1_000_000] = content["optimizer"]["state"][0]
    torch.save(content, file)
    assert "parameter 1000000 is trained there, not here" in refused(file=file)


def test_a_file_that_says_its_attention_heads_is_taken_at_its_word(refused, published):
    file = published()
    torch.save({**torch.load(file), "num_heads": 2}, file)
    assert "--num-heads is 2 there, 4 here" in refused(file=file)


def test_the_command_says_it_in_one_line_and_leaves_no_folder(published, train, tmp_path, capsys):
    assert train(*FLAGS, "--moco-dim", 16, "--resume", published()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is another model: --moco-dim is 32 there, 16 here" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_go_on_as_one(published, train, start, losses, sample, tmp_path):
    flags = [*FLAGS, "--resume", published(), "--max-steps", 45, "--dtype", "float64", "--amp", "off"]
    assert train(*flags, out="one") == 0
    two = start(*flags, "--data", sample, "--out", tmp_path / "two", ranks=2)
    assert two.wait(300) == 0, two.communicate()[1]
    assert list(losses("two")) == [43, 44, 45]
    assert list(losses("two").values()) == pytest.approx(list(losses("one").values()), abs=1e-9, rel=0)
