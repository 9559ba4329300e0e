"""Bytes against tensors counted by hand; predicted times against closed forms."""

import json
import math
from dataclasses import replace as changed

import pytest
import torch

from benchmarks import communication, results
from benchmarks.communication import Communication, Traffic, measured_step, predict, traffic
from benchmarks.results import Measurement
from trainer.config import Config, replace
from trainer.engine import build_model
from trainer.presets import PRESETS

DIM, MLP, WIDTH = 16, 32, 24


@pytest.fixture
def vit() -> Config:
    sizes = {"embed_dim": WIDTH, "depth": 1, "num_heads": 2, "moco_dim": DIM, "moco_mlp_dim": MLP, "image_size": 32}
    return replace(PRESETS["vit-s-300ep"](), **sizes, data="unused", out="unused")


def test_a_transformer_by_hand(vit):
    t = traffic(vit, batch=4, amp=True)
    block = 3 * WIDTH * WIDTH + 3 * WIDTH + WIDTH * WIDTH + WIDTH  # attention
    block += 2 * 4 * WIDTH * WIDTH + 4 * WIDTH + WIDTH  # MLP
    block += 2 * 2 * WIDTH  # its two norms
    # Patch projection and position embedding are frozen; class token and last norm are not.
    backbone = block + WIDTH + 2 * WIDTH
    # Linear layers without bias; batch norm after each, the last one without weight and bias.
    projector = WIDTH * MLP + MLP * MLP + MLP * DIM + 2 * 2 * MLP
    predictor = DIM * MLP + MLP * DIM + 2 * MLP
    assert t.gradients == 4 * (backbone + projector + predictor)
    assert t.keys == 2 * 4 * DIM * 2
    # Channels of the norms: projector MLP, MLP, DIM, in both encoders; predictor MLP, DIM.
    heads, predicted = [MLP, MLP, DIM], [MLP, DIM]
    assert t.statistics == 2 * 4 * sum(2 * c + 1 for c in [*heads, *heads, *predicted])
    assert t.statistics_gradients == 2 * 4 * sum(2 * c for c in [*heads, *predicted])
    assert (t.norm_gathers, t.norm_reduces, t.key_gathers) == (2 * 8, 2 * 5, 2)


def test_keys_have_the_width_that_is_counted(vit):
    model = build_model(vit)
    x = torch.randn(2, 4, 3, 32, 32)
    for amp, counted in ((True, 2), (False, 4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            keys = model.keys(x[0], x[1])
        assert sum(k.numel() * k.element_size() for k in keys) == traffic(vit, 4, amp).keys == 2 * 4 * DIM * counted


def test_a_resnet_synchronises_its_backbone_too():
    config = replace(PRESETS["r50-100ep"](), data="unused", out="unused")
    t = traffic(config, 256, amp=True)
    # 53 norms of a ResNet-50 and 2 of its projector in both encoders, 1 of the predictor.
    assert t.norm_gathers == 2 * (2 * 55 + 1)
    assert t.gradients > 4 * 23_000_000


SIMPLE = Traffic(
    gradients=200 * 10**6, keys=10**6, statistics=10**5, statistics_gradients=10**5,
    key_gathers=2, norm_gathers=16, norm_reduces=10,
)  # fmt: skip


def test_times_within_a_node_by_hand():
    flags = Communication(nvlink=100.0, network=10.0, latency_us=10.0)
    p = predict(SIMPLE, 8, flags, step_ms=100.0)
    start = 3 * 0.01  # log2 8 doublings
    buckets = math.ceil(200e6 / (25 * 2**20))
    assert p.gradients_ms == pytest.approx(2 * 7 / 8 * 200e6 / 100e9 * 1e3 + buckets * start)
    assert p.keys_ms == pytest.approx(7 * 1e6 / 100e9 * 1e3 + 2 * start)
    assert p.statistics_ms == pytest.approx((7 + 2 * 7 / 8) * 1e5 / 100e9 * 1e3 + 26 * start)
    assert p.sent_mb == pytest.approx(1.75 * 200.1 + 7 * 1.1)
    # 50 ms of backward hide all gradients but the last bucket.
    assert p.exposed_ms == pytest.approx(p.gradients_ms / buckets + p.keys_ms + p.statistics_ms)
    assert p.exposed_ms is not None
    assert p.efficiency == pytest.approx(100 / (100 + p.exposed_ms))


def test_beyond_a_node_the_network_counts_and_gradients_stick_out():
    flags = Communication(nvlink=100.0, network=10.0, latency_us=0.0)
    p = predict(SIMPLE, 64, flags, step_ms=20.0)
    gradients = 2 * 63 / 64 * 200e6 / 10e9 * 1e3
    assert p.gradients_ms == pytest.approx(gradients)
    assert p.exposed_ms == pytest.approx(gradients - 10.0 + p.keys_ms + p.statistics_ms)


def test_one_gpu_tells_nobody_and_without_a_step_there_is_no_efficiency():
    alone = predict(SIMPLE, 1, Communication(), step_ms=5.0)
    assert (alone.sent_mb, alone.exposed_ms, alone.efficiency) == (0.0, 0.0, 1.0)
    assert predict(SIMPLE, 8, Communication(), step_ms=None).efficiency is None


def test_the_step_is_the_newest_of_that_architecture_and_batch_on_a_gpu(result, tmp_path):
    def write(created, ms, arch="vit_base", batch=256, gpu="H200", hardware="h200"):
        results.write(
            changed(
                result(hardware=hardware),
                benchmark="step",
                subject=arch,
                created=created,
                environment=result().environment | {"hardware": hardware, "gpu": {"name": gpu} if gpu else None},
                configuration=result().configuration | {"batch_size": batch, "amp": "bf16"},
                measurements=(Measurement("step", "step on a cached batch", "ms/step", (ms,), "lower"),),
            ),
            tmp_path,
        )

    assert measured_step(tmp_path, "vit_base", 256) is None
    write("2026-01-01", 150.0)
    write("2026-01-02", 140.0, hardware="h100", gpu="H100")
    write("2026-01-03", 9999.0, hardware="cpu", gpu=None)
    assert measured_step(tmp_path, "vit_base", 256) == (
        140.0,
        "step-vit_base-h100.json: H100, batch 256, amp bf16, 16 threads",
    )
    assert measured_step(tmp_path, "vit_base", 64) is None


def test_the_command_says_prediction_and_writes_json(tmp_path, capsys):
    file = tmp_path / "x.json"
    flags = ["--preset", "vit-s-300ep", "--step-ms", "60", "--results", str(tmp_path), "--json", str(file)]
    assert communication.main(flags) == 0
    printed = capsys.readouterr().out
    assert "PREDICTION" in printed
    assert "Nothing here is measured" in printed
    assert [p["gpus"] for p in json.loads(file.read_text())["predictions"]] == [1, 8, 64, 512]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "x"], "--preset x"),
        (["--network", "0"], "--network 0"),
        (["--backward-share", "7"], "--backward-share 7"),
    ],
)
def test_wrong_use_is_one_line(flags, said, capsys):
    assert communication.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
