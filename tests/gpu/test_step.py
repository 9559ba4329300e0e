"""The step on a GPU: nothing waits, nothing is bad for ever, the same numbers twice, the fast kernels."""

import json
from contextlib import contextmanager

import pytest
import torch

from trainer import checkpoint, run
from trainer.engine import autocast

from ..trainer.conftest import TINY as DEMO
from ..trainer.engines import engine_for, views_for
from ..trainer.test_nonfinite import with_a_bad_step

STEPS = [
    ["--amp", "bf16"],
    ["--amp", "fp16"],
    ["--amp", "fp16", "--optimizer", "lars"],
    ["--amp", "bf16", "--optimizer", "lars", "--clip-grad", 1.0, "--arch", "vit_conv_small"],
    ["--amp", "bf16", "--microbatch", 5],
    ["--amp", "bf16", "--compile", "on"],
    ["--amp", "tf32"],
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flags", STEPS, ids=lambda flags: "-".join(map(str, flags)).strip("-"))
def test_no_operation_of_a_step_waits_for_the_gpu(flags, sample):
    engine = engine_for(sample / "train", "--device", "cuda", *flags)
    views = [views_for(engine, seed) for seed in range(3)]
    for pair in views:  # compiles, allocates, makes the optimizer's state
        engine.train_step(pair)
    with waiting_is_an_error():
        for pair in views:
            engine.train_step(pair)
    assert engine.watch.read(engine.scaler.get_scale()).fatal is None
    engine.loader.close()


@pytest.mark.parametrize("augment", ["fused", "dali"])
def test_the_training_thread_never_synchronises_between_two_rows(sample, tmp_path, augment):
    engine = engine_for(sample / "train", "--device", "cuda", "--amp", "bf16", "--augment", augment)
    batches = iter(engine.loader)
    engine.train_step(next(batches).views)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for batch in batches:
            with torch.profiler.record_function("a step of the training thread"):
                engine.train_step(batch.views, batch.indices)
    engine.loader.close()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event.get("name") == "a step of the training thread" and "dur" in event]
    threads = {event["tid"] for event in steps if event.get("cat") == "user_annotation"}
    # The profiler itself waits for the device when it begins and ends.
    start = min(event["ts"] for event in steps if event.get("cat") == "user_annotation")
    end = max(event["ts"] + event["dur"] for event in steps if event.get("cat") == "user_annotation")
    called = {
        event["name"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and event["tid"] in threads
        and start <= event["ts"] < end
    }
    assert any("Launch" in name for name in called)
    assert not [name for name in called if "Synchronize" in name]


@pytest.mark.parametrize("flags", STEPS[:3], ids=lambda flags: "-".join(map(str, flags)).strip("-"))
def test_a_bad_step_changes_nothing(flags, sample):
    before, after, later, undisturbed, reading = with_a_bad_step(sample / "train", "--device", "cuda", *flags)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    # Where a gradient is rounding noise, AdamW goes either way, by as much as its rate.
    torch.testing.assert_close(later, undisturbed, rtol=1e-3, atol=4e-4)
    assert reading.numbers["bad_steps"] == [{"step": 2, "rank": 0, "indices": [2]}]


@pytest.fixture
def precision_restored():
    """To torch's own defaults: its settings are no plain attributes, which monkeypatch could put back."""
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


@pytest.mark.parametrize(("amp", "least", "most"), [("off", 0, 5e-5), ("tf32", 5e-5, 1e-2)])
def test_what_stays_float32_has_the_bits_that_were_asked_for(amp, least, most, sample, precision_restored):
    engine_for(sample / "train", "--device", "cuda", "--amp", amp).loader.close()
    a, b = torch.randn(2, 256, 256, device="cuda")
    image, kernel = torch.randn(1, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    for product, x, y in ((torch.mm, a, b), (torch.conv2d, image, kernel)):
        exact = product(x.double(), y.double())
        error = (product(x, y) - exact).abs().max() / exact.abs().max()
        assert least < error < most


@pytest.mark.parametrize("arch", ["vit_conv_small", "resnet18"])
def test_deterministic_runs_are_equal_bit_for_bit(arch, sample, tmp_path):
    flags = [*DEMO, "--device", "cuda", "--data", str(sample), "--deterministic", "--max-steps", "5"]
    if arch == "resnet18":
        flags += f"--arch {arch} --embed-dim None --depth None --num-heads None --optimizer lars".split()
    states = []
    try:
        for out in (tmp_path / "first", tmp_path / "second"):
            assert run([*flags, "--out", str(out)]) == 0
            file, _ = checkpoint.newest(out)
            assert file is not None
            states.append(checkpoint.load(file)["model"])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("heads", [2, 1])
def test_attention_takes_a_fused_kernel(heads, sample):
    # 64 channels: heads of 32, as in vit_small, and of 64, as in vit_base.
    flags = ["--embed-dim", 64, "--num-heads", heads, "--amp", "bf16"]
    engine = engine_for(sample / "train", "--device", "cuda", *flags)
    view = views_for(engine, 0)[0]
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profiler, autocast(engine.config, engine.device):
        engine.model.encode_view(view).sum().backward()
    engine.loader.close()
    called = {event.key for event in profiler.key_averages()}
    fused = ("flash", "cudnn", "efficient")
    for direction in ("attention", "attention_backward"):
        assert any(f"aten::_scaled_dot_product_{kind}_{direction}" in called for kind in fused), called
