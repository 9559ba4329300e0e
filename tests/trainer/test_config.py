"""The command line: presets are the published recipes, and wrong values get one line."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from dali_pipes import DatasetIndex, ViewLoader
from model import MoCoV3
from tests.golden.cases import load
from trainer.config import FREE, Config, ConfigError, disagreements, parse, replace
from trainer.evaluation_commands import Linear
from trainer.presets import PRESETS

from .engines import engine_for

NEEDED = ["--data", "images", "--out", "run"]

# As FAIR published them: arch, epochs, batch, base lr, weight decay, optimizer, warm-up, T, m, crop-min, frozen stem.
PUBLISHED = {
    "r50-100ep": ("resnet50", 100, 4096, 0.6, 1e-6, "lars", 10, 1.0, 0.99, 0.2, False),
    "r50-300ep": ("resnet50", 300, 4096, 0.3, 1e-6, "lars", 10, 1.0, 0.99, 0.2, False),
    "r50-1000ep": ("resnet50", 1000, 4096, 0.3, 1.5e-6, "lars", 10, 1.0, 0.996, 0.2, False),
    "vit-s-300ep": ("vit_small", 300, 4096, 1.5e-4, 0.1, "adamw", 40, 0.2, 0.99, 0.08, True),
    "vit-b-300ep": ("vit_base", 300, 4096, 1.5e-4, 0.1, "adamw", 40, 0.2, 0.99, 0.08, True),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_is_the_published_recipe(preset):
    config = parse([preset, *NEEDED])
    model, optim = config.model, config.optim
    assert PUBLISHED[preset] == (
        model.arch,
        optim.epochs,
        optim.batch_size,
        optim.lr,
        optim.weight_decay,
        optim.optimizer,
        optim.warmup_epochs,
        model.moco_t,
        model.moco_m,
        config.data.crop_min,
        model.stop_grad_conv1,
    )
    assert model.moco_m_cos
    assert (model.moco_dim, model.moco_mlp_dim, optim.momentum, config.data.image_size) == (256, 4096, 0.9, 224)


def test_the_default_preset_is_vit_s():
    assert parse(NEEDED) == parse(["vit-s-300ep", *NEEDED])


def test_flags_override_the_preset_under_the_references_names():
    config = parse(["demo", *NEEDED, "-a", "resnet50", "-b", "96", "--wd", "0.3", "-j", "7", "--no-moco-m-cos"])
    assert (config.model.arch, config.optim.batch_size, config.optim.weight_decay) == ("resnet50", 96, 0.3)
    assert config.data.workers == 7
    assert not config.model.moco_m_cos


@pytest.mark.parametrize("argv", [["--batch-sise", "3"], ["--epochs", "many"], ["--amp", "fp8"], ["stray"]])
def test_a_wrong_flag_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["demo", *NEEDED, *argv])
    assert exit_.value.code == 2
    printed = "".join(capsys.readouterr())
    assert argv[0] in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("flags", "found", "expected"),
    [
        (["--optimizer", "lars", "--momentum", 0.5], lambda e: e.optimizer.defaults["momentum"], 0.5),
        (["--optimizer", "lars", "--weight-decay", 0.25], lambda e: e.optimizer.defaults["weight_decay"], 0.25),
        (["--weight-decay", 0.25], lambda e: e.optimizer.defaults["weight_decay"], 0.25),
        (["--jpeg-engine", "off"], lambda e: e.loader._stream._decoder.jpeg_engine, False),
        ([], lambda e: e.loader._stream._decoder.jpeg_engine, True),
        (["--moco-t", 0.5], lambda e: e.model.temperature, 0.5),
        (["--moco-m", 0.5, "--no-moco-m-cos"], lambda e: momentum_halfway(e), 0.5),
        (["--moco-m", 0.5], lambda e: momentum_halfway(e), pytest.approx(0.75)),
    ],
)
def test_what_flags_reach(flags, found, expected, sample):
    engine = engine_for(sample / "train", *flags)
    assert found(engine) == expected
    engine.loader.close()


def momentum_halfway(engine):
    engine.step = engine.total / 2
    engine._schedule()
    return engine.momentum


def test_the_seed_deals_the_images(sample):
    index = DatasetIndex.scan(sample / "train")
    for seed in (0, 1):
        engine = engine_for(sample / "train", "--seed", seed)
        ours = next(iter(engine.loader))
        theirs = next(iter(ViewLoader(index, batch_size=16, seed=seed, image_size=32, num_threads=1)))
        assert torch.equal(ours.indices, theirs.indices)
        engine.loader.close()


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"vit-xxl is not known; choose from: demo, .*vit-b-300ep"):
        parse(["vit-xxl", *NEEDED])


@pytest.mark.parametrize(
    ("flags", "world_size", "line"),
    [
        ({"batch_size": 100}, 8, "--batch-size 100 is not divisible by world size 8; use 96 or 104"),
        ({"batch_size": 6}, 8, "--batch-size 6 is not divisible by world size 8; use 8"),
        ({"batch_size": 1}, 1, "--batch-size 1: the contrastive loss needs at least 2 images a step"),
        ({"crop_min": 1.5}, 1, "--crop-min 1.5 is not above 0 and at most 1"),
        ({"crop_min": 0.0}, 1, "--crop-min 0.0 is not above 0 and at most 1"),
        ({"moco_m": -0.1}, 1, "--moco-m -0.1 is not between 0 and 1"),
        ({"warmup_epochs": 30, "epochs": 20}, 1, "--warmup-epochs 30 is not between 0 and --epochs 20"),
        ({"moco_t": 0.0}, 1, "--moco-t 0.0 is not positive"),
        ({"moco_t": math.inf}, 1, "--moco-t inf is not positive and finite"),
        ({"seed": 2**62}, 1, f"--seed {2**62} is too large"),
        ({"image_size": -1}, 1, "--image-size -1 is not positive"),
        (
            {"arch": "resnet50"},
            1,
            "--arch resnet50 has no width and depth; if the name is right, add --embed-dim None --depth None",
        ),
        ({"depth": 0}, 1, "--depth 0 is not positive"),
        ({"workers": 0}, 1, "--workers 0 is not positive"),
        ({"max_steps": 0}, 1, "--max-steps 0 is not positive"),
        ({"save_every": "0"}, 1, "--save-every 0: give steps, as in 500, or minutes, as in 30min"),
        ({"save_every": "5h"}, 1, "--save-every 5h: give steps"),
        ({"keep_every": 0}, 1, "--keep-every 0 is not positive"),
        ({"dtype": "float64", "amp": "bf16"}, 1, "--dtype float64 with --amp bf16"),
        ({"lr": float("nan")}, 1, "--lr nan is not a finite number of at least 0"),
        ({"knn_every": -1}, 1, "--knn-every -1 is negative; use 0 or more"),
        ({"knn_every": 5, "knn": False}, 1, "--knn-every 5 with --no-knn: leave one of them out"),
        ({"weight_decay": -1.0}, 1, "--weight-decay -1.0 is not a finite number of at least 0"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_its_mend(flags, world_size, line):
    config = replace(parse(["demo", *NEEDED]), **flags)
    with pytest.raises(ConfigError) as error:
        config.check(world_size)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_its_own_check(preset):
    parse([preset, *NEEDED]).check(world_size=8)


def test_what_changes_learning_must_agree_and_the_rest_may_differ():
    first = parse(["demo", *NEEDED])
    free = replace(first, workers=3, device="cpu", compile="on", log_every=1, keep=9, timeout=5, max_steps=4, knn=False)
    assert disagreements(first.flags(), free.flags()) == []
    other = replace(first, arch="vit_base", seed=1)
    assert disagreements(first.flags(), other.flags()) == [
        "--arch is vit_conv_small there, vit_base here",
        "--seed is 0 there, 1 here",
    ]


def test_every_free_flag_exists():
    assert parse(["demo", *NEEDED]).flags().keys() >= FREE


def test_no_flag_stands_in_two_sections():
    config = parse(["demo", *NEEDED])
    sections = [getattr(config, item.name) for item in dataclasses.fields(config)]
    assert len(config.flags()) == sum(len(dataclasses.fields(section)) for section in sections)


# Flags of the reference's two programs that have no counterpart here, or another default, and why.
LEFT_OUT = {
    "data": "a flag here, not a position",
    "arch": "the default preset is a ViT-S",
    "workers": "DALI threads of a rank, not processes of a node",
    "start_epoch": "the checkpoint says it",
    "resume": "a path or nothing",
    "seed": "always set here, without effect there",
    "evaluate": "a probe is not kept",
    "pretrained": "--run says it",
    **dict.fromkeys(
        ("world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed", "gpu"), "torchrun"
    ),
}
RENAMED = {"learning_rate": "lr", "print_freq": "log_every"}


def same(program):
    return [flag for flag in load("cli")[program] if flag not in LEFT_OUT]


@pytest.mark.parametrize("flag", same("main_moco"))
def test_a_flag_of_the_reference_has_its_default(flag):
    golden = load("cli")["main_moco"][flag]
    assert Config().flags()[RENAMED.get(flag, flag)] == golden["default"]


@pytest.mark.parametrize("flag", [flag for flag in same("main_moco") if flag != "print_freq"])
def test_a_flag_of_the_reference_is_known_by_all_its_names(flag):
    golden = load("cli")["main_moco"][flag]
    for name in golden["flags"]:
        argv = [name] if golden["default"] is False else [name, str(golden["default"])]
        config = parse(["vit-s-300ep", *NEEDED, *argv])
        assert config.flags()[RENAMED.get(flag, flag)] == (golden["default"] or True)


@pytest.mark.parametrize("flag", [flag for flag in same("main_lincls") if flag not in RENAMED])
def test_a_flag_of_the_references_probe_has_its_default(flag):
    probe = Linear(run=Path("run"), data=Path("images"))
    assert getattr(probe, flag) == load("cli")["main_lincls"][flag]["default"]


def test_the_references_learning_rate_of_the_probe_is_among_ours():
    probe = Linear(run=Path("run"), data=Path("images"))
    rate = load("cli")["main_lincls"]["learning_rate"]["default"]
    with torch.device("meta"):
        models = [MoCoV3.build("resnet18", image_size=32, heads="vit"), MoCoV3.build("convnext_atto", image_size=32)]
    assert all(rate in probe.rates(model.family) for model in models)
    assert rate not in probe.rates("vit")
