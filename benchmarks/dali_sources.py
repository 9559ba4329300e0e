"""Sources made of DALI: the product's own loader, decoding alone, and the graph that is usual elsewhere."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from nvidia.dali import fn, pipeline_def, types

from dali_pipes import IMAGENET_MEAN, IMAGENET_STD, DatasetIndex, Recipe, ViewLoader, ViewSpec

PREFETCH = 2  # DALI's default queue, and ViewLoader's


class Views:
    """`ViewLoader` as the trainer uses it, endless."""

    burst = 1
    in_flight = PREFETCH + 1

    def __init__(
        self,
        index: DatasetIndex,
        recipe: Recipe,
        batch: int,
        image_size: int,
        threads: int,
        device: torch.device,
        augment: Literal["dali", "fused"] = "dali",
    ) -> None:
        self.settings = {
            "batch": batch,
            "image_size": image_size,
            "threads": threads,
            "augment": augment,
            "output": "uint8",
        }
        fused: dict[str, Any] = {"augment": "fused"} if augment == "fused" else {}
        self._loader = ViewLoader(
            index,
            recipe=recipe,
            batch_size=batch,
            image_size=image_size,
            num_threads=threads,
            device=device,
            output="uint8",
            **fused,
        )

    def batches(self) -> Iterator[int]:
        """Batches of epoch after epoch."""
        while True:
            for batch in self._loader:
                yield len(batch.indices)

    def close(self) -> None:
        """Free the pipeline."""
        self._loader.close()


class Pipeline:
    """A DALI pipeline that reads the files itself, endless."""

    burst = 1
    in_flight = PREFETCH + 1

    def __init__(
        self, graph: Callable[[], Any], batch: int, threads: int, device: torch.device, **settings: Any
    ) -> None:
        """`graph` is defined as DALI's `pipeline_def` wants it; it reads no Python state while it runs."""
        self.settings = {"batch": batch, "threads": threads, **settings}
        self._batch = batch
        make = pipeline_def(
            graph,
            batch_size=batch,
            num_threads=threads,
            device_id=device.index if device.type == "cuda" else None,
            prefetch_queue_depth=PREFETCH,
            enable_conditionals=True,
        )
        self._pipeline = make()
        self._pipeline.build()

    def batches(self) -> Iterator[int]:
        """Batches of the reader, whose last one of a pass is filled up."""
        while True:
            self._pipeline.run()
            yield self._batch

    def close(self) -> None:
        """Free the pipeline."""
        self._pipeline._shutdown()


def decode_only(
    index: DatasetIndex, batch: int, threads: int, device: torch.device, hw_decoder_load: float = 1.0
) -> Pipeline:
    """Read and decode, at full size, as the product decodes; `hw_decoder_load` is the JPEG engine's share on a GPU."""

    def graph() -> Any:
        return _decoded(index, device, jpeg_fancy_upsampling=True, hw_decoder_load=hw_decoder_load)

    settings = {"hw_decoder_load": hw_decoder_load} if device.type == "cuda" else {}
    return Pipeline(graph, batch, threads, device, **settings)


def color_twist(
    index: DatasetIndex, recipe: Recipe, batch: int, image_size: int, threads: int, device: torch.device
) -> Pipeline:
    """Two views by the operators that DALI offers for it, random numbers drawn in the graph: the usual public graph.

    Not the same result: its contrast turns on 128, its hue is a rotation in YIQ, its order is fixed; 8 grey levels
    from Pillow on average. Conditionals, so that what a coin leaves out is not computed.
    """

    def graph() -> Any:
        image = _decoded(index, device)
        return tuple(_twisted_view(image, spec, image_size) for spec in recipe.views)

    return Pipeline(graph, batch, threads, device, image_size=image_size, output="float16, normalised")


def _decoded(index: DatasetIndex, device: torch.device, **options: Any) -> Any:
    encoded, _ = fn.readers.file(
        files=index.paths, shuffle_after_epoch=True, dont_use_mmap=True, pad_last_batch=True, name="reader"
    )
    where = "mixed" if device.type == "cuda" else "cpu"
    return fn.decoders.image(encoded, device=where, output_type=types.RGB, **options)


def _twisted_view(image: Any, spec: ViewSpec, size: int) -> Any:
    x = fn.random_resized_crop(image, size=size, random_area=spec.crop_scale, random_aspect_ratio=spec.crop_ratio)
    if fn.random.coin_flip(probability=spec.jitter, dtype=types.BOOL):
        x = fn.color_twist(
            x,
            brightness=fn.random.uniform(range=[1 - spec.brightness, 1 + spec.brightness]),
            contrast=fn.random.uniform(range=[1 - spec.contrast, 1 + spec.contrast]),
            saturation=fn.random.uniform(range=[1 - spec.saturation, 1 + spec.saturation]),
            hue=fn.random.uniform(range=[-360 * spec.hue, 360 * spec.hue]),
        )
    if fn.random.coin_flip(probability=spec.grayscale, dtype=types.BOOL):
        x = fn.hsv(x, saturation=0.0)
    if fn.random.coin_flip(probability=spec.blur, dtype=types.BOOL):
        x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=list(spec.sigma)))
    if spec.solarize > 0:
        x = _solarized(x, spec)
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT16,
        output_layout="CHW",
        mirror=fn.random.coin_flip(probability=spec.flip),
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
    )


def _solarized(x: Any, spec: ViewSpec) -> Any:
    if fn.random.coin_flip(probability=spec.solarize, dtype=types.BOOL):
        inverted = x >= spec.solarize_threshold
        x = fn.cast(inverted * (255 - x) + (inverted == 0) * x, dtype=types.UINT8)
    return x
