"""The three benchmarks as commands, as small as they go: what they write holds together; wrong use is one line."""

import os
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import ablation, ablation_variants, loader, microbatch, parity, reference_step, results, step, variants
from benchmarks.command import Common, run
from benchmarks.progress import Progress
from dali_pipes import DatasetIndex
from tests.dali_pipes.odd_files import broken_inside
from trainer import engine, preparation

LOADER: Any = (loader.Loader, loader.measure_loaders, loader.draw)
STEP: Any = (step.Step, step.measure_step, step.draw)
MICROBATCH: Any = (microbatch.Microbatch, microbatch.measure_microbatch, microbatch.draw)
ABLATION: Any = (ablation.Ablation, ablation.measure_ablation, ablation.draw)
PARITY: Any = (parity.Parity, parity.measure_parity, parity.draw)
VARIANTS: Any = (variants.Variants, variants.measure_variants, variants.draw)
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--workers", "1", "--batch-size", "2", "--image-size", "32", "--rounds", "2"]


def command(benchmark, argv):
    flags, measure, draw = benchmark
    return run(flags, measure, draw, argv)


@pytest.fixture
def result_of(tree, tmp_path, capsys):
    """Run a benchmark on small images; gives its result back, read from the file, and checks what all must hold."""

    def call(benchmark, *flags):
        code = command(benchmark, [*SMALL, "--data", str(tree), "--out", str(tmp_path), *flags])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        (file,) = tmp_path.glob("*.json")
        assert file.with_suffix(".png").stat().st_size > 10_000
        result = results.read(file)
        assert result.configuration["rounds"] == 2
        assert result.environment["versions"]["torch"]
        assert result.gpu["available"] is False
        assert "the benchmark ran on the CPU" in printed.out
        assert all(isfinite(value) for m in result.measurements for value in m.values)
        assert len({m.key for m in result.measurements}) == len(result.measurements)
        assert "round 1 of 2" in printed.err
        return result

    return call


def test_loader(result_of):
    result = result_of(LOADER, "--seconds", "0.01", "--no-sweeps")
    rates = {m.name: m.values for m in result.of("loader") if m.quantity == "images/s"}
    assert len(rates) == 6
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    assert rates.keys() == result.settings.keys()
    assert all("batch" in settings for settings in result.settings.values())


def test_files_that_not_all_read_are_left_out(tree, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for i, path in enumerate(DatasetIndex.scan(tree).paths[:2]):
        with Image.open(path) as image:
            image.save(folder / f"{i}.jpg")
            image.save(folder / f"{i}.bmp")
            image.save(os.fsencode(folder) + b"/caf\xe9.jpg")
    (folder / "broken.png").write_bytes(broken_inside(0))
    kept = Common(data=folder).readable_by_all(Progress("test"))
    assert [Path(path).name for path in kept.paths] == ["0.jpg", "1.jpg"]


def test_ablation_costs_are_differences_of_the_same_round(result_of):
    result = result_of(ABLATION, "--batches", "1", "--no-sweeps", "--no-per-view")
    group = "both views, dali"
    whole = result.find(group, "all on", "CPU-ms/image").values
    less = result.find(group, "without blur", "CPU-ms/image").values
    cost = result.find(f"{group}: costs", "blur", "CPU-ms/image saved by leaving it out").values
    assert cost == tuple(a - b for a, b in zip(whole, less, strict=True))
    assert {m.name for m in result.of(f"{group}: costs")} == set(ablation_variants.AUGMENTATIONS)
    assert result.notes[0].startswith(f"{group}: all on is")
    assert "measured in this run: vit_conv_small" in result.notes[1]


def test_step_intervals_sum_to_the_step(result_of, tmp_path):
    trace = tmp_path / "traces" / "trace.json"
    result = result_of(STEP, "--steps", "2", "--trace", str(trace))
    assert result.subject == "vit_conv_small 32px"
    parts = [m for m in result.of(step.SHARES) if m.quantity == "ms"]
    whole = result.find(step.RATES, "step on JPEGs", "ms/step").values
    for turn in range(2):
        assert 0.8 * whole[turn] < sum(m.values[turn] for m in parts) <= whole[turn]
    rate = result.find(step.RATES, "step on JPEGs", "images/s").values
    assert rate == pytest.approx([1000 * 2 / ms for ms in whole])
    assert '"forward q"' in trace.read_text()


def test_variants_from_the_reference_to_the_trainers_step(result_of):
    result = result_of(VARIANTS, "--presets", "demo", "--compile", "off")
    rates = [m for m in result.of("vit_conv_small") if m.quantity == "images/s"]
    # On the CPU there is no bf16 row, and without a compiler no compiled one; each is said.
    # The demo's stem has batch norm.
    left_out = {variants.BF16, "+ torch.compile", variants.ONE_PASS, *variants.EXPERIMENTS}
    assert [m.name for m in rates] == [row for row in variants.ROWS if row not in left_out]
    assert all(any(row in note and "left out" in note for note in result.notes) for row in left_out)
    times = result.find("vit_conv_small", variants.OURS, "ms/step").values
    assert rates[-1].values == pytest.approx([1000 * 2 / ms for ms in times])
    assert not any(m.headline for m in result.measurements)


@pytest.mark.slow
def test_chunks_need_less_memory_and_give_the_same(tree, tmp_path, capsys):
    sizes = ["--batch-size", "96", "--chunks", "4", "--image-size", "64", "--depth", "1", "--rounds", "1"]
    flags = ["--device", "cpu", "--data", str(tree), "--out", str(tmp_path), *sizes]
    assert command(MICROBATCH, flags) == 0, capsys.readouterr().err
    (file,) = tmp_path.glob("*.json")
    result = results.read(file)

    def value(name, quantity):
        return result.find(microbatch.GROUP, name, quantity).values[0]

    assert value("--microbatch 4", microbatch.MEMORY) < 0.8 * value(microbatch.WHOLE, microbatch.MEMORY)
    for quantity in ("loss: relative difference", "gradients: largest difference / largest"):
        assert value("--microbatch 4", quantity) < 1e-4
        assert value("float64: --microbatch 4", quantity) < 1e-9
        assert value(microbatch.WHOLE, quantity) == 0


def test_a_step_that_dies_is_named():
    flags = microbatch.Microbatch(image_size=32, depth=1)
    config = microbatch._config(flags, batch=4, chunks=(2,), device=CPU, say=print)
    views = torch.zeros(2, 4, 7, 32, 32, dtype=torch.uint8)  # of seven channels
    with pytest.raises(results.ResultError, match="the step with --microbatch 2 failed: exit code 1"):
        microbatch.take(config, CPU, views, 2)


def test_variants_may_compile_the_same_model_twice(result_of, monkeypatch):
    pytest.importorskip("torchao.float8", exc_type=ImportError)

    def traced(model):
        for part in (model.normalize, model.base_encoder, model.momentum_encoder, model.predictor):
            part.compile(fullgraph=True, dynamic=False, backend="eager")  # all of torch.compile but the compiler

    monkeypatch.setattr(reference_step, "compile_encoders", traced)
    monkeypatch.setattr(engine, "compile_encoders", traced)
    monkeypatch.setattr(preparation, "_missing_compiler", lambda device: None)
    monkeypatch.setattr(variants, "multiplies_float8", lambda device: True)  # it is emulated
    result = result_of(VARIANTS, "--presets", "demo")
    rates = {m.name for m in result.of("vit_conv_small") if m.quantity == "images/s"}
    assert rates == set(variants.ROWS) - {variants.BF16, variants.ONE_PASS, variants.CUDA_GRAPHS}
    assert any(f"{variants.CUDA_GRAPHS} left out: the CPU has none" in note for note in result.notes)


def test_a_row_that_runs_out_of_memory_is_left_out_and_the_others_stay(result_of, monkeypatch):
    train_step, calls = reference_step.ReferenceStep.train_step, 0

    def hungry(self, *arguments):
        nonlocal calls
        if self.changes.fused_optimizer and not self.changes.no_host_wait:  # one row without bf16
            calls += 1
            if calls > variants.WARM_UP + 1:  # its second round
                raise torch.OutOfMemoryError("no memory")
        return train_step(self, *arguments)

    monkeypatch.setattr(reference_step.ReferenceStep, "train_step", hungry)
    result = result_of(VARIANTS, "--presets", "demo", "--compile", "off", "--steps", "1")
    rates = {m.name for m in result.of("vit_conv_small") if m.quantity == "images/s"}
    assert "+ fused optimizer" not in rates
    assert {variants.REFERENCE, "+ no wait for the loss", variants.OURS} <= rates
    assert any("+ fused optimizer left out: the GPU has no memory" in note for note in result.notes)


def test_an_experiment_that_fails_is_left_out_with_its_reason(result_of, monkeypatch):
    def failing(model, device):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(reference_step, "float8_blocks", failing)
    monkeypatch.setattr(reference_step, "compile_encoders", lambda model: None)
    monkeypatch.setattr(engine, "compile_encoders", lambda model: None)
    monkeypatch.setattr(preparation, "_missing_compiler", lambda device: None)
    monkeypatch.setattr(variants, "multiplies_float8", lambda device: True)
    result = result_of(VARIANTS, "--presets", "demo")
    assert any(f"{variants.FLOAT8} left out: no kernel for this." in note for note in result.notes)
    assert result.find("vit_conv_small", variants.OURS, "ms/step").values


@pytest.mark.parametrize(
    ("benchmark", "flags", "said"),
    [
        (LOADER, ["--rounds", "0"], "--rounds 0"),
        (LOADER, ["--data", "nowhere"], "nowhere"),
        (LOADER, ["--image-size", "0"], "--image-size"),
        (ABLATION, ["--workers", "-1"], "--workers -1"),
        (MICROBATCH, ["--chunks", "0"], "--chunks 0"),
        (MICROBATCH, ["--chunks", "8", "--batch-size", "8"], "from 1 to 7, below"),
        (MICROBATCH, ["--batch-size", "0"], "--batch-size 0"),
        (PARITY, ["--rounds", "0"], "--rounds 0"),
        (VARIANTS, ["--batch-size", "0"], "--batch-size 0"),
        (STEP, ["--steps", "0"], "--steps 0"),
        (MICROBATCH, ["--preset", "r50-100ep"], "batch norm"),
        (STEP, ["--preset", "vit-x"], "vit-x"),
        (STEP, ["--image-size", "33"], "33"),
        (STEP, ["--batch-size", "1"], "--batch-size 1"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(benchmark, flags, said, tree, tmp_path, capsys):
    chosen = ["--device", "cpu", "--out", str(tmp_path), *flags]
    assert command(benchmark, [*chosen, *([] if "--data" in flags else ["--data", str(tree)])]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert not list(tmp_path.iterdir())


def test_a_result_that_cannot_be_written_is_shown_all_the_same(tree, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write", full)
    flags = ["--seconds", "0.01", "--no-sweeps", "--data", str(tree), "--out", str(tmp_path)]
    assert command(LOADER, [*SMALL, *flags]) == 2
    printed = capsys.readouterr()
    assert "dali: two views" in printed.out
    assert f"benchmarks.loader: error: {tmp_path} cannot be written: No space left on device" in printed.err
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *arguments: False)  # root may write anywhere
    assert command(LOADER, [*SMALL, "--data", str(tree), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path} cannot be written" in printed.err
    assert not printed.out


def test_some_images_of_a_folder_are_from_all_over_it(tree):
    everything = DatasetIndex.scan(tree).names
    found = Common(data=tree, images=3).index(Progress("test"))
    assert found.names == [everything[0], everything[5], everything[11]]
