"""The same graph on the GPU: the same views, up to the decoder's own difference, in memory of the device."""

import pytest
import torch

from dali_pipes import EvalLoader, ViewLoader

SIZE = 96


def views(index, device, **options):
    loader = ViewLoader(index, batch_size=len(index), image_size=SIZE, device=device, **options)
    return next(iter(loader))


def test_views_are_channels_last_on_the_device(photos):
    batch = views(photos, "cuda")
    for view in batch.views:
        assert view.device == torch.device("cuda", torch.cuda.current_device())
        assert view.dtype == torch.uint8
        assert view.shape == (len(photos), 3, SIZE, SIZE)
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_views_are_those_of_the_cpu(photos):
    on_gpu, on_cpu = views(photos, "cuda"), views(photos, "cpu")
    assert on_gpu.indices.tolist() == on_cpu.indices.tolist()
    for ours, theirs in zip(on_gpu.views, on_cpu.views, strict=True):
        gap = (ours.cpu().float() - theirs.float()).abs()
        # nvJPEG's inverse transform is not libjpeg-turbo's: well under a grey level with fancy upsampling on.
        assert gap.mean() < 1.0


def test_a_second_pass_gives_the_same_bytes(photos):
    first, again = views(photos, "cuda"), views(photos, "cuda")
    for ours, theirs in zip(first.views, again.views, strict=True):
        assert torch.equal(ours, theirs)


def test_batches_stay_as_they_were_while_the_next_are_made(photos):
    """What is queued on torch's stream reads the batch before DALI may use its memory again."""
    loader = ViewLoader(photos, batch_size=2, image_size=SIZE, device="cuda")
    sums, kept = [], []
    for _ in range(5):
        for batch in loader:
            torch.cuda._sleep(2_000_000)  # the stream lags behind the host
            sums.append(batch.views[0].float().sum())
            kept.append(batch.views[0].clone())
    assert [float(each) for each in sums] == [float(each.float().sum()) for each in kept]
    reference = ViewLoader(photos, batch_size=2, image_size=SIZE, device="cuda")
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


def test_the_host_does_not_wait_for_a_batch(photos):
    """Handing over a batch queues a wait on torch's stream, and none on the host."""
    loader = ViewLoader(photos, batch_size=4, image_size=SIZE, device="cuda")
    batches = iter(loader)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(batches).views[0].float().mean()
    finally:
        torch.cuda.set_sync_debug_mode("default")
