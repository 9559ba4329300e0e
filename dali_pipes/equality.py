"""How far the augmentations are from Pillow and torchvision, on your own images.

    python -m dali_pipes.equality --data DIR --sizes 224 96 32 --draws 100

First the decoder: on a GPU its JPEG engine and its CUDA decoder apart. Then a row a DALI operator, by itself on the
pixels that torchvision has before it; and a row a view, as the loader that trains gives it. Both sides are given the
same parameters, and start from the same files; on a GPU, where a decoder's pixels are its own, from those pixels.
"""

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from dali_pipes.alone import operator_gaps
from dali_pipes.augment import Augment, why_not_fused
from dali_pipes.counting import scan_shown
from dali_pipes.gap import Gap
from dali_pipes.graph import decode
from dali_pipes.index import DatasetIndex
from dali_pipes.listing import DatasetError, training_tree
from dali_pipes.loader import ViewLoader, available
from dali_pipes.order import epoch_permutation
from dali_pipes.reference import load_image, reference_view
from dali_pipes.sampling import sample_params
from dali_pipes.views import MOCO_V2, MOCO_V3, SIMCLR, Recipe, multi_crop

# Of DINO's local views two show what eight would: they are of one chain.
RECIPES = {"moco-v3": MOCO_V3, "moco-v2": MOCO_V2, "simclr": SIMCLR, "multi-crop": multi_crop(2)}
Pixels = TypeVar("Pixels")
_BATCH = 16  # images in memory at a time, decoded


@dataclass(frozen=True)
class Row:
    """One line of the table; `mean` and `most` in grey levels, the shares 0 to 1."""

    size: int | None  # of the view, pixels; None: at the image's own size
    what: str
    mean: float
    most: int
    differ: float
    by_more: float

    @classmethod
    def of(cls, size: int | None, what: str, gap: Gap) -> "Row":
        """A gap under a name."""
        return cls(size, what, gap.mean, gap.most, gap.differ, gap.by_more)


def main(
    data: Path,
    sizes: tuple[int, ...] = (224, 96, 32),
    draws: int = 100,
    device: Literal["cpu", "cuda"] = "cpu",
    augment: Literal["auto", "fused", "dali"] = "auto",
    recipe: Literal["moco-v3", "moco-v2", "simclr", "multi-crop"] = "moco-v3",
    seed: int = 0,
    outside: bool = False,
    file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Prints how far each operator and each view is from Pillow and torchvision, in grey levels from 0 to 255.

    Args:
        data: folder of images; its train/, if there is one; or a list file.
        sizes: of the views, pixels; of the largest one, if they differ.
        draws: of parameters; images are taken in the order of a run's epochs, again if there are fewer.
        device: where to decode and augment.
        augment: who makes the views of the crops, DALI's operators or the fused kernels; auto: as in training.
        recipe: whose views; the operators by themselves have the strengths of its first view.
        seed: of the order and of what is drawn.
        outside: let a list file name images outside of its folder.
        file: also write the table here, as JSON.
    """
    if draws < 1 or min(sizes, default=0) < 1:
        raise ValueError(f"--draws {draws} --sizes {' '.join(map(str, sizes))}: give numbers above 0")
    available(device)
    index = scan_shown(training_tree(data), outside)
    if file is not None:
        file.open("ab").close()  # what cannot be written is told before the work
    chosen: Augment = "dali" if augment == "dali" else "fused"
    if augment == "auto" and (device == "cpu" or why_not_fused(torch.device(device), RECIPES[recipe]) is not None):
        chosen = "dali"
    decoder = decoder_rows(index, draws, device, seed)
    rows = table(index, RECIPES[recipe], sizes, draws, device, seed, chosen)
    versions = {name: version(name) for name in ("pillow", "torchvision", "nvidia-dali-cuda120")}
    where = device if device == "cpu" else torch.cuda.get_device_name()
    title = f"{recipe}, {draws} draws over {len(index)} images, {where}, views by {chosen}; "
    # Piped, the width of a terminal is not known: nothing is to be cut off.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(_drawn(decoder, f"decoder, {where}"))
    console.print(_drawn(rows, title + ", ".join(map(" ".join, versions.items()))))
    if file is not None:
        facts = {"data": str(data), "images": len(index), "recipe": recipe, "draws": draws, "device": where}
        tables = {"decoder": [asdict(row) for row in decoder], "rows": [asdict(row) for row in rows]}
        content = {**facts, "augment": chosen, "seed": seed, "versions": versions, **tables}
        file.write_text(json.dumps(content, indent=2) + "\n")


def decoder_rows(index: DatasetIndex, draws: int, device: str = "cpu", seed: int = 0) -> list[Row]:
    """The decoder against Pillow; on CUDA the JPEG engine, CUDA without it, and the one against the other."""
    gaps = defaultdict[str, Gap](Gap)
    for rows, _ in _chunks(index, min(draws, len(index)), seed):
        paths = [index.path(row) for row in rows]
        theirs = _named(lambda some: list(map(load_image, some)), paths)
        ours = _named(partial(decode, device=device), paths)
        gaps["decoder" if device == "cpu" else "JPEG engine on"] += Gap.between(ours, theirs)
        if device != "cpu":
            by_cuda = _named(partial(decode, device=device, jpeg_engine=False), paths)
            gaps["JPEG engine off"] += Gap.between(by_cuda, theirs)
            gaps["on against off"] += Gap.between(ours, by_cuda)
    return [Row.of(None, name, gap) for name, gap in gaps.items()]


def _named(decoder: Callable[[list[str]], Pixels], paths: list[str]) -> Pixels:
    """What a decoder gives for these files; an error, which names none of them, becomes one that does."""
    try:
        return decoder(paths)
    except Exception:  # Pillow raises many types
        for path in paths:
            try:
                decoder([path])
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                mend = "another image stands in for it in training; here, move it away and start again"
                raise DatasetError(f"{path} cannot be decoded ({reason}); {mend}") from None
        raise


def table(
    index: DatasetIndex,
    recipe: Recipe,
    sizes: Sequence[int],
    draws: int,
    device: str = "cpu",
    seed: int = 0,
    augment: Augment = "dali",
) -> list[Row]:
    """For each size every DALI operator, and every view of the recipe by that back end."""
    found = []
    for size in sizes:
        spec, alone = recipe.scaled(size).views[0], defaultdict[str, Gap](Gap)
        for rows, epoch in _chunks(index, draws, seed):
            images = [load_image(index.path(row)) for row in rows]
            params = sample_params(spec, 0, seed, epoch, rows, index.heights[rows], index.widths[rows])
            for name, gap in operator_gaps(images, spec, params, device).items():
                alone[name] += gap
        found += [Row.of(spec.size, name, gap) for name, gap in alone.items()]
        views = view_gaps(index, recipe, size, draws, device, seed, augment)
        found += [Row.of(size, f"view {number}", gap) for number, gap in enumerate(views, start=1)]
    return found


def view_gaps(
    index: DatasetIndex,
    recipe: Recipe,
    size: int,
    draws: int,
    device: str = "cpu",
    seed: int = 0,
    augment: Augment = "dali",
) -> list[Gap]:
    """Of each view of the loader to the reference, over that many images, in the order of its epochs."""
    batch_size = min(_BATCH, len(index))
    loader = ViewLoader(index, recipe, batch_size, seed, device=device, image_size=size, num_threads=2, augment=augment)
    specs = recipe.scaled(size).views
    gaps, left = [Gap() for _ in specs], draws
    for epoch in itertools.count():
        for batch in loader:
            rows = batch.indices.numpy()[:left]
            images = _decoded([index.path(row) for row in rows], device)
            for view, spec in enumerate(specs):
                params = sample_params(spec, view, seed, epoch, rows, index.heights[rows], index.widths[rows])
                theirs = [reference_view(image, spec, params, i) for i, image in enumerate(images)]
                ours = batch.views[view][: len(rows)].permute(0, 2, 3, 1).cpu().numpy()
                gaps[view] += Gap.between(ours, theirs)
            left -= len(rows)
            if not left:
                loader.close()
                return gaps
    raise AssertionError  # the epochs do not end


def _decoded(paths: list[str], device: str) -> list[Image.Image]:
    """By Pillow; for views that are made on a GPU, by its decoder, whose own difference has a table of its own."""
    if device == "cpu":
        return [load_image(path) for path in paths]
    return [Image.fromarray(pixels) for pixels in decode(paths, device)]


def _chunks(index: DatasetIndex, draws: int, seed: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Rows of the index, few at a time, in the order of the epochs, and which epoch they are of."""
    for epoch in range(-(-draws // len(index))):
        order = epoch_permutation(len(index), seed, epoch)[: draws - epoch * len(index)]
        for start in range(0, len(order), _BATCH):
            yield order[start : start + _BATCH], epoch


def _drawn(rows: list[Row], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in ("size", "what"):
        shown.add_column(name)
    for name in ("mean absolute error", "max", "differ", "off by more than 1"):
        shown.add_column(name, justify="right")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.size != row.size:
            shown.add_section()
        size = "full" if row.size is None else str(row.size)
        shown.add_row(size, row.what, f"{row.mean:.5f}", str(row.most), f"{row.differ:.3%}", f"{row.by_more:.4%}")
    return shown


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m dali_pipes.equality")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
