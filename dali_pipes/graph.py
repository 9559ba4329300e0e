"""The DALI graph: read ▸ decode once ▸ views. It applies parameters and draws nothing: one graph serves any epoch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types

from dali_pipes import operators
from dali_pipes.views import ViewSpec

OUTPUTS = ("uint8", "float16", "float32")

# All JPEGs that the hardware engine can read go to it. DALI's default is a share of each batch, and then the decoder of
# an image, and with it perhaps a pixel, would depend on the image's place in the batch. Without an engine: no effect.
_HARDWARE_SHARE = 1.0


def build_pipeline(
    source: Callable[[], Sequence[Any]],
    names: Sequence[Sequence[str]],
    specs: Sequence[ViewSpec],
    *,
    batch_size: int,
    device: torch.device,
    output: str,
    num_threads: int,
    prefetch: int,
) -> Any:
    """A built pipeline whose outputs are one (N, size, size, 3) batch a view, on `device`.

    Args:
        source: called once a batch, in order, `prefetch` batches ahead; returns a list of the files' names as uint8
            arrays, then for each view the arrays that `names` lists (see `arguments.py`). N may be below `batch_size`.
        names: for each view, the names of its inputs.
        specs: for each view, what it applies.
        batch_size: the largest N.
        device: "cpu", or a CUDA device: then decoding and augmentation run there.
        output: "uint8": RGB; "float16", "float32": normalised with ImageNet's mean and deviation.
        num_threads: of the host's work: reading, parsing, and on the CPU decoding and augmentation.
        prefetch: batches kept ready or in work.

    Returns:
        An `nvidia.dali.Pipeline`. Its failures are `RuntimeError`, after which it is no longer valid.
    """
    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def graph() -> tuple[Any, ...]:
        path, *flat = fn.external_source(source=source, num_outputs=1 + sum(map(len, names)), batch=True)
        image = decoded(path, on_gpu)
        views = []
        for i in range(len(specs)):
            inputs = {name: flat.pop(0) for name in names[i]}
            views.append(operators.finish(operators.view(image, inputs, specs[i]), inputs["flip"], output))
        return tuple(views)

    pipeline = graph()
    pipeline.build()
    return pipeline


def decoded(path: Any, on_gpu: bool) -> Any:
    """The images of files, uint8 (height, width, 3) RGB: on the CPU bit for bit what Pillow's convert("RGB") gives."""
    # Reading by mmap makes a file that became empty stick: every later batch fails, too.
    encoded = fn.io.file.read(path, dont_use_mmap=True)
    return fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,  # as torchvision's ImageFolder loader
        jpeg_fancy_upsampling=True,  # as libjpeg-turbo; off, nvJPEG differs from it by up to 84 levels
        hw_decoder_load=_HARDWARE_SHARE,
    )
