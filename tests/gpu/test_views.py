"""The same loader on the GPU, by either back end: the same views, up to the decoder's own difference, on the device."""

import gc
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dali_pipes import MOCO_V3, DatasetIndex, EvalLoader, ViewLoader, sample_params
from dali_pipes.augment import why_not_fused
from dali_pipes.gap import Gap
from dali_pipes.graph import decode
from dali_pipes.reference import load_image
from tests.dali_pipes.failing import delete, empty, halve, recompress, truncate, zero
from tests.dali_pipes.test_fused import normalised
from tests.dali_pipes.test_fused_loader import after_the_crop, crops_only
from tests.dali_pipes.test_operators import reduced

SIZE = 96
PHOTOS = Path(__file__).parents[1] / "photos"


@pytest.fixture(params=["dali", "fused"])
def augment(request):
    reason = why_not_fused(torch.device("cuda", 0), MOCO_V3)
    if request.param == "fused" and reason is not None:
        pytest.fail(f"the fused kernels are not tested here: {reason}")
    return request.param


def views(index, device, **options):
    loader = ViewLoader(index, batch_size=len(index), image_size=SIZE, device=device, **options)
    return next(iter(loader))


def test_views_are_channels_last_on_the_device(photos, augment):
    batch = views(photos, "cuda", augment=augment)
    for view in batch.views:
        assert view.device == torch.device("cuda", torch.cuda.current_device())
        assert view.dtype == torch.uint8
        assert view.shape == (len(photos), 3, SIZE, SIZE)
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_views_are_those_of_the_cpu(photos, augment):
    on_gpu, on_cpu = views(photos, "cuda", augment=augment), views(photos, "cpu")
    assert on_gpu.indices.tolist() == on_cpu.indices.tolist()
    for ours, theirs in zip(on_gpu.views, on_cpu.views, strict=True):
        gap = (ours.cpu().float() - theirs.float()).abs()
        # nvJPEG's inverse transform is not libjpeg-turbo's: well under a grey level with fancy upsampling on.
        assert gap.mean() < 1.0


@pytest.mark.parametrize("output", ["uint8", "float16", "bfloat16"])
def test_fused_views_are_pillows_on_the_same_crops_byte_for_byte(photos, output):
    ours = views(photos, "cuda", augment="fused", output=output)
    crops = views(photos, "cuda", recipe=crops_only(MOCO_V3))
    rows = ours.indices.tolist()
    assert rows == crops.indices.tolist()
    for number, spec in enumerate(MOCO_V3.scaled(SIZE).views):
        params = sample_params(spec, number, 0, 0, rows, photos.heights[rows], photos.widths[rows])
        theirs = after_the_crop(spec, crops.views[number].permute(0, 2, 3, 1).cpu().numpy(), params)
        mine = ours.views[number].permute(0, 2, 3, 1).contiguous().view(torch.uint8).cpu().numpy()
        expected = theirs if output == "uint8" else normalised(theirs, output).view(torch.uint8).numpy()
        np.testing.assert_array_equal(mine, expected)


def test_the_back_ends_differ_by_the_operators_rounding(photos):
    fused, dali = (views(photos, "cuda", augment=augment) for augment in ("fused", "dali"))
    for ours, theirs in zip(fused.views, dali.views, strict=True):
        gap = Gap.between(ours.cpu().numpy(), theirs.cpu().numpy())
        assert gap.mean < 0.05
        assert gap.by_more < 0.005


@pytest.mark.parametrize("ratio", [1.5, 2, 3, 4])
def test_crop_rounds_halves_up(ratio):
    np.testing.assert_array_equal(*reduced(ratio, "cuda"))


@pytest.mark.parametrize("engine", [True, False])
def test_either_decoder_is_near_pillow(photos, engine):
    gap = Gap.between(decode(photos.paths, "cuda", engine), map(load_image, photos.paths))
    assert gap.mean < 1.0
    assert gap.differ > 0  # else it was libjpeg-turbo that decoded, not nvJPEG


@pytest.mark.parametrize("engine", [True, False])
def test_the_pixels_of_an_image_do_not_depend_on_its_batch(photos, engine):
    together = decode(photos.paths, "cuda", engine)
    for path, expected in zip(photos.paths, together, strict=True):
        (alone,) = decode([path], "cuda", engine)
        np.testing.assert_array_equal(alone, expected)


@pytest.mark.parametrize("damage", [truncate, halve, delete, empty, zero, recompress])
def test_a_bad_file_takes_no_other_slot_along(tmp_path, damage, augment):
    shutil.copytree(PHOTOS, tmp_path / "photos")
    index = DatasetIndex.scan(tmp_path / "photos")
    options = {"batch_size": 4, "image_size": SIZE, "device": "cuda", "augment": augment}
    undisturbed = list(ViewLoader(index, **options))
    bad = int(undisturbed[1].indices[2])
    damage(Path(index.path(bad)))
    with pytest.warns(UserWarning, match="another image takes its place"):
        batches = list(ViewLoader(index, **options))
    for batch, before in zip(batches, undisturbed, strict=True):
        for slot, row in enumerate(before.indices.tolist()):
            if row == bad:
                assert batch.indices[slot] != bad
                continue
            assert batch.indices[slot] == row
            assert all(torch.equal(a[slot], b[slot]) for a, b in zip(batch.views, before.views, strict=True))


SCRAMBLED = """
import sys
from pathlib import Path
import torch
from dali_pipes import DatasetIndex, ViewLoader
from tests.dali_pipes.failing import scramble

index, engine = DatasetIndex.scan(sys.argv[1]), sys.argv[2] == "True"
options = {"batch_size": 4, "image_size": 96, "device": "cuda", "jpeg_engine": engine}
before = [(batch.indices.tolist(), batch.views) for batch in ViewLoader(index, **options)]
bad = before[1][0][2]
scramble(Path(index.path(bad)))
for (rows, views), batch in zip(before, ViewLoader(index, **options), strict=True):
    for slot, row in enumerate(rows):
        if row != bad:
            assert batch.indices[slot] == row
            assert all(torch.equal(a[slot], b[slot]) for a, b in zip(batch.views, views, strict=True))
"""


@pytest.mark.parametrize("engine", [True, False])
def test_a_jpeg_that_is_damaged_inside_does_not_crash_the_decoder(tmp_path, engine):
    """Whether it counts as bad is up to nvJPEG, which has crashed on such files in the past (CUDA 13's notes)."""
    shutil.copytree(PHOTOS, tmp_path / "photos")
    line = [sys.executable, "-c", SCRAMBLED, str(tmp_path / "photos"), str(engine)]
    ended = subprocess.run(line, cwd=PHOTOS.parents[1], timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_second_pass_gives_the_same_bytes(photos, augment):
    first, again = views(photos, "cuda", augment=augment), views(photos, "cuda", augment=augment)
    for ours, theirs in zip(first.views, again.views, strict=True):
        assert torch.equal(ours, theirs)


def test_batches_stay_as_they_were_while_the_next_are_made(photos, augment):
    """What is queued on torch's stream reads the batch before its memory may be used again."""
    loader = ViewLoader(photos, batch_size=2, image_size=SIZE, device="cuda", augment=augment)
    sums, kept = [], []
    for _ in range(5):
        for batch in loader:
            torch.cuda._sleep(200_000_000)  # the stream lags behind the host
            sums.append(batch.views[0].float().sum())
            kept.append(batch.views[0].clone())
    assert [float(each) for each in sums] == [float(each.float().sum()) for each in kept]
    reference = ViewLoader(photos, batch_size=2, image_size=SIZE, device="cuda", augment=augment)
    for epoch in range(5):
        for step, batch in enumerate(reference):
            torch.cuda.synchronize()
            assert torch.equal(batch.views[0], kept[epoch * len(reference) + step])


@pytest.mark.parametrize("output", ["float16", "float32"])
def test_normalised_output(photos, output):
    ours = views(photos, "cuda", output=output).views[0]
    raw = views(photos, "cuda").views[0].float() / 255
    mean, deviation = (
        torch.tensor(v, device="cuda")[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close(
        ours.float(), (raw - mean) / deviation, atol=2e-3 if output == "float16" else 1e-5, rtol=0
    )


def test_evaluation_images_are_those_of_the_cpu(photos):
    ours, theirs = (
        next(iter(EvalLoader(photos, batch_size=len(photos), resize=110, crop=SIZE, device=device)))
        for device in ("cuda", "cpu")
    )
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert (ours.images.cpu() - theirs.images).abs().mean() < 1.0 / 255 / 0.225


def test_the_host_does_not_wait_for_a_batch(photos, augment, monkeypatch):
    """Handing over a batch queues a wait on a stream, and none on the host."""
    loader = ViewLoader(photos, batch_size=4, image_size=SIZE, device="cuda", augment=augment)
    batches = iter(loader)
    next(batches)  # compiles the kernels
    # Torch sees only its own waits; DALI does without where it is given a stream.
    pipeline = loader._stream._pipeline
    asked = Mock(wraps=pipeline.outputs)
    monkeypatch.setattr(pipeline, "outputs", asked)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(batches).views[0].float().mean()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(asked.call_args.kwargs["cuda_stream"], torch.cuda.Stream)


def test_fused_views_overlap_with_training(photos):
    """They are finished on their own stream while the training stream still works on the batch before."""
    loader = ViewLoader(photos, batch_size=4, image_size=SIZE, device="cuda", augment="fused")
    for _ in range(3):  # while DALI's memory still grows, it waits for the device
        list(loader)
    batches = iter(loader)
    next(batches)
    torch.cuda.synchronize()
    training = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # about two seconds of work
    training.record()
    batch = next(batches)
    assert loader._stream._fused is not None
    stream = loader._stream._fused.stream
    assert stream is not None
    assert stream != torch.cuda.current_stream()
    stream.synchronize()
    assert not training.query()
    sums = batch.views[0].float().sum()  # queued behind the sleep
    torch.cuda.synchronize()
    assert float(sums) > 0


def test_memory_of_the_device_is_flat(photos, augment):
    """As the driver counts it: torch's, DALI's and the decoder's."""
    loader = ViewLoader(photos, batch_size=4, image_size=SIZE, device="cuda", augment=augment)

    def epochs(count):
        for _ in range(count):
            for batch in loader:
                batch.views[0].float().mean()
        gc.collect()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20

    # DALI's memory grows by 64 MiB at a time, and may do so once more; what leaks would go on.
    used = [epochs(5), epochs(20), epochs(20)]
    assert min(used[1] - used[0], used[2] - used[1]) < 16


def test_a_closed_loader_gives_the_devices_memory_back(photos, augment):
    """DALI would keep what its pipelines had, where torch cannot use it."""

    def used():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20

    def cycle():
        loader = ViewLoader(photos, batch_size=8, image_size=SIZE, device="cuda", augment=augment)
        next(iter(loader))
        held = used()
        loader.close()
        return held, used()

    cycle()  # what libraries load and keep
    held, left = cycle()
    assert left < held
    assert cycle()[1] - left < 16
