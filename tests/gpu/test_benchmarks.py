"""What the benchmarks can only tell on a GPU: device time, streams beside the step, both back ends, energy."""

import dataclasses
from functools import partial
from math import isfinite
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, results, step, variants
from benchmarks.command import run
from benchmarks.float8 import multiplies_float8
from benchmarks.intervals import INTERVALS
from benchmarks.reference_step import Changes, ReferenceStep, side_by_side
from benchmarks.trace import OTHER, Trace, beside, device_milliseconds
from trainer.config import Config, replace
from trainer.presets import PRESETS

HERE = Path(__file__).parent
CUDA = torch.device("cuda", 0)


def multiply(count=20):
    x = torch.randn(2048, 2048, device=CUDA)
    for _ in range(count):
        x = x @ x


def test_device_time_is_that_of_the_queued_work():
    assert device_milliseconds(lambda: None, CUDA) == 0
    few, many = (device_milliseconds(partial(multiply, count), CUDA) for count in (1, 200))
    assert 0 < few < many


def test_a_trace_tells_the_training_stream_from_the_others(tmp_path):
    side, file = torch.cuda.Stream(CUDA), tmp_path / "trace.json"
    multiply()
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profiler:
        with torch.profiler.record_function("forward q"):
            multiply(200)
        with torch.cuda.stream(side):
            multiply()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
    trace = Trace.read(file)
    training = trace.training_stream(INTERVALS)
    assert training is not None
    found = beside(trace, training)
    assert found[OTHER].milliseconds > 0
    # The side stream had nothing to wait for: at least its beginning ran beside the training stream's work.
    assert 0 < found[OTHER].hidden <= 1


@pytest.fixture
def result_of(tmp_path, capsys):
    """Run a benchmark's short form on the photos; gives its result back, read from the file."""

    def call(flags, measure, draw, *argv):
        photos = str(HERE.parent / "photos")
        code = run(flags, measure, draw, ["--quick", "--data", photos, "--out", str(tmp_path), *argv])
        assert code == 0, capsys.readouterr().err
        (file,) = tmp_path.glob("*.json")
        result = results.read(file)
        assert all(isfinite(value) for m in result.measurements for value in m.values)
        return result

    return call


def test_an_ablation_tells_device_time_of_both_back_ends(result_of):
    flags = ["--batch-size", "8", "--image-size", "64"]
    result = result_of(ablation.Ablation, ablation.measure_ablation, ablation.draw, *flags)
    for augment in ("dali", "fused"):
        whole = result.find(f"both views, {augment}", "all on", "device-ms/image")
        assert min(whole.values) > 0
        assert result.find(f"both views, {augment}: costs", "jitter", "% of a step").values


def test_a_step_tells_what_runs_beside_it(result_of):
    flags = ["--preset", "demo", "--batch-size", "8", "--compile", "off", "--steps", "3"]
    result = result_of(step.Step, step.measure_step, step.draw, *flags)
    beside_it = {m.name for m in result.of(step.BESIDE)}
    assert beside_it & {"decode", "augmentation", OTHER}
    whole = result.find(step.RATES, step.CACHED, "ms/step").values
    for turn in range(3):  # the stream's own clock, and the host's
        parts = [m.values[turn] for m in result.of(step.TIMES) if m.quantity == "ms"]
        assert sum(parts) == pytest.approx(whole[turn], rel=0.3)


@pytest.mark.parametrize(("added", "near"), [({"cuda_graphs": True}, 1e-3), ({"float8": True}, 0.3)])
def test_experiments_learn_what_the_step_without_them_learns(added, near):
    if "float8" in added:
        pytest.importorskip("torchao.float8", exc_type=ImportError)
        if not multiplies_float8(CUDA):
            pytest.skip("this GPU does not multiply float8")
    sizes = {"arch": "vit_small", "embed_dim": 64, "depth": 2, "num_heads": 2, "moco_dim": 32, "moco_mlp_dim": 64}
    config: Config = replace(PRESETS["demo"](), **sizes, data="unused", out="unused", image_size=64, batch_size=12)
    x1, x2 = torch.randint(0, 256, (2, 12, 3, 64, 64), dtype=torch.uint8, device=CUDA)

    def losses(changes):
        step = ReferenceStep(config, CUDA, changes)
        return torch.stack([torch.as_tensor(step.train_step(x1, x2, 1e-3, 0.9)) for _ in range(6)])

    # Compiled as well: what the compiler rounds differently would be 2 % in six steps.
    without = Changes(amp="bf16", foreach_ema=True, fused_optimizer=True, no_host_wait=True, uint8=True, compile=True)
    with side_by_side():
        torch.testing.assert_close(losses(dataclasses.replace(without, **added)), losses(without), rtol=near, atol=0)
    torch._dynamo.reset()


def test_variants_reach_the_trainers_step(result_of):
    flags = ["--presets", "demo", "--batch-size", "8", "--image-size", "64"]
    result = result_of(variants.Variants, variants.measure_variants, variants.draw, *flags)
    rates = [m.name for m in result.of("vit_conv_small") if m.quantity == "images/s"]
    assert rates[0] == variants.REFERENCE
    assert variants.OURS in rates
    memory = [m.values[0] for m in result.of("vit_conv_small") if m.quantity == "peak memory, GB"]
    assert len(memory) == len(rates)
    assert min(memory) > 0
