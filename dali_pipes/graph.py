"""The DALI graph: read ▸ decode once ▸ views. It applies parameters and draws nothing: one graph serves any epoch."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from dali_pipes import operators
from dali_pipes.index import DatasetIndex
from dali_pipes.views import ViewSpec

OUTPUTS = ("uint8", "float16", "float32")
_BUFFER = 1 << 30  # bytes of RGB, for a whole batch: so much at most is the engine asked to set aside beforehand


@dataclass(frozen=True)
class Decoder:
    """Where and how images are decoded. On the GPU, JPEGs by its hardware engine or by CUDA, all or none.

    DALI's default is a share of each batch for the engine; then the decoder of an image, and with it perhaps a pixel,
    would depend on the image's place in the batch. So it would, too, should a pipeline begin with a batch that is
    shorter than the next ones: nvImageCodec counts the engine's share by the first. The engine reads baseline JPEGs;
    what it cannot read, and all where there is no engine (A100, H100 and later have one), goes to CUDA as without it.
    """

    on_gpu: bool = False
    jpeg_engine: bool = True
    height: int = 0  # pixels, of each image in the engine's buffer; it grows for larger ones
    width: int = 0

    @classmethod
    def of(cls, index: DatasetIndex, device: torch.device, batch_size: int, jpeg_engine: bool = True) -> "Decoder":
        """With a buffer for a batch of the index's largest image where that is within `_BUFFER`, else up to it."""
        side = math.isqrt(_BUFFER // (3 * batch_size))
        height, width = int(index.heights.max()), int(index.widths.max())
        return cls(device.type == "cuda", jpeg_engine, min(height, side), min(width, side))


def build_pipeline(
    source: Callable[[], Sequence[Any]],
    names: Sequence[Sequence[str]],
    specs: Sequence[ViewSpec],
    *,
    batch_size: int,
    device: torch.device,
    decoder: Decoder,
    output: str,
    crops_only: bool,
    num_threads: int,
    prefetch: int,
) -> Any:
    """A built pipeline whose outputs are one (N, size, size, 3) batch a view, on `device`.

    Args:
        source: called once a batch, in order, `prefetch` batches ahead; returns a list of the files' names as uint8
            arrays, their sizes as int32 (N, 1), then for each view the arrays that `names` lists (see `arguments.py`).
            N may be below `batch_size`.
        names: for each view, the names of its inputs.
        specs: for each view, what it applies.
        batch_size: the largest N.
        device: "cpu", or a CUDA device: then decoding and augmentation run there.
        decoder: on the same device.
        output: "uint8": RGB; "float16", "float32": normalised with ImageNet's mean and deviation.
        crops_only: the views are the crops, uint8, and nothing else is applied.
        num_threads: of the host's work: reading, parsing, and on the CPU decoding and augmentation.
        prefetch: batches kept ready or in work.

    Returns:
        An `nvidia.dali.Pipeline`. Its failures are `RuntimeError`, after which it is no longer valid.
    """

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def graph() -> tuple[Any, ...]:
        path, size, *flat = fn.external_source(source=source, num_outputs=2 + sum(map(len, names)), batch=True)
        image = decoded(path, size, decoder)
        views = []
        for i in range(len(specs)):
            inputs = {name: flat.pop(0) for name in names[i]}
            if crops_only:
                view = operators.crop(image, inputs, specs[i].size)
            else:
                view = operators.finish(operators.view(image, inputs, specs[i]), inputs["flip"], output)
            views.append(view)
        return tuple(views)

    pipeline = graph()
    pipeline.build()
    return pipeline


def decoded(path: Any, size: Any, decoder: Decoder) -> Any:
    """The images of files, uint8 (height, width, 3) RGB: on the CPU bit for bit what Pillow's convert("RGB") gives, but
    for 16-bit gray, which Pillow clips at 255.

    size: of each file in bytes, as it was scanned; 0: not known. A file of another size is a failure.
    """
    # Reading by mmap makes a file that became empty stick: every later batch fails, too.
    encoded = fn.io.file.read(path, dont_use_mmap=True)
    # All of it, and the same file. A decoder may take one that was cut off for a whole one, and leave the rest of the
    # image gray. A slice that begins or ends outside is an error.
    found = encoded.shape(dtype=types.INT32)
    start = dali_math.min(size - found, 0) * (size > 0)
    whole = dali_math.max(found, size)
    encoded = fn.slice(encoded, start=start, shape=whole, axes=[0], out_of_bounds_policy="error")
    options: dict[str, Any] = {}
    if decoder.on_gpu:
        options["hw_decoder_load"] = 1.0 if decoder.jpeg_engine else 0.0
        options["preallocate_height_hint"], options["preallocate_width_hint"] = decoder.height, decoder.width
    return fn.decoders.image(
        encoded,
        device="mixed" if decoder.on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,  # as torchvision's ImageFolder loader
        jpeg_fancy_upsampling=True,  # as libjpeg-turbo; off, nvJPEG differs from it by up to 84 levels
        **options,
    )


def decode(
    paths: Sequence[str], device: torch.device | str = "cpu", jpeg_engine: bool = True
) -> list[NDArray[np.uint8]]:
    """The pixels that the graph's decoder gives for these files; of JPEGs on CUDA, its engine or CUDA itself.

    Raises:
        RuntimeError: it fails on one of them.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    number = (device.index or 0) if cuda else None

    @pipeline_def(batch_size=len(paths), num_threads=2, device_id=number, prefetch_queue_depth=1)
    def graph() -> Any:
        names = [np.frombuffer(os.fsencode(path), np.uint8) for path in paths]
        return decoded(fn.external_source(source=lambda: names, batch=True), 0, Decoder(cuda, jpeg_engine))

    (output,) = graph().run()
    return [np.array(image) for image in output.as_cpu()]
