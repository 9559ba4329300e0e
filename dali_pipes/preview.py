"""A picture of what the recipe does to your images.

    python -m dali_pipes.preview --data DIR --out views.png

Each image beside its views, which come from the loader that trains, with what was drawn for them above. The frames in
the original show what the views see.
"""

import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dali_pipes.counting import scan_shown
from dali_pipes.index import DatasetIndex
from dali_pipes.listing import training_tree
from dali_pipes.loader import Batch, ViewLoader
from dali_pipes.reference import load_image
from dali_pipes.replacing import replacing
from dali_pipes.sampling import SampleParams, sample_params
from dali_pipes.views import MOCO_V3, Recipe

_COLOURS = ("#e8562a", "#2a7de8", "#2aa84f", "#8d4fd0")  # a view's frame
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_ACROSS = 2  # images in a row of the picture
_CELL, _TITLE = 2.9, 0.8  # of one view and of the text above it, inches


def main(
    data: Path,
    out: Path = Path("views.png"),
    count: int = 12,
    seed: int = 0,
    epoch: int = 0,
    image_size: int = 224,
    crop_min: float = 0.08,
    outside: bool = False,
) -> None:
    """Writes a picture of images and their MoCo v3 views.

    Args:
        data: folder of images; its train/, if there is one; or a list file.
        out: the picture to write; its ending says which type.
        count: number of images.
        seed: as of a run; the images are the first ones of its epoch.
        epoch: from 0.
        image_size: of the views, pixels.
        crop_min: smallest crop, as a share of the image's area.
        outside: let a list file name images outside of its folder.
    """
    if (kind := out.suffix.lower().removeprefix(".")) not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--out {out}: its ending names no type of picture; use .png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    index = scan_shown(training_tree(data), outside)
    recipe = MOCO_V3.with_crop_min(crop_min).scaled(image_size)
    loader = ViewLoader(index, recipe, min(count, len(index)), seed, image_size=image_size)
    loader.set_epoch(epoch)
    batch = next(iter(loader))
    rows = batch.indices.numpy()
    sizes = index.heights[rows], index.widths[rows]
    drawn = [sample_params(spec, view, seed, epoch, rows, *sizes) for view, spec in enumerate(recipe.views)]
    with replacing(out) as stream:
        picture(index, recipe, batch, drawn).savefig(stream, format=kind, dpi=100)
    print(f"{out}: {len(rows)} of {len(index)} images, seed {seed}, epoch {epoch}")


def picture(index: DatasetIndex, recipe: Recipe, batch: Batch, drawn: list[SampleParams]) -> Figure:
    """The images of a batch, `_ACROSS` in a row, each followed by its views."""
    high, wide = -(-len(batch.indices) // _ACROSS), 1 + len(recipe.views)
    figure = Figure(figsize=(_CELL * wide * _ACROSS, (_CELL + _TITLE) * high))
    parts = figure.subfigures(1, _ACROSS, squeeze=False, wspace=0.02)[0]
    for part in parts:
        part.subplots_adjust(0.01, 0.0, 0.99, 1 - _TITLE / (high * (_CELL + _TITLE)), 0.04, _TITLE / _CELL)
    columns = [part.subplots(high, wide, squeeze=False) for part in parts]
    for cell in np.concatenate(columns).flat:
        cell.set_axis_off()
    for i, row in enumerate(batch.indices.tolist()):
        group = columns[i % _ACROSS][i // _ACROSS]
        original = load_image(index.path(row))
        group[0].imshow(np.asarray(original))
        name = Path(index.path(row)).name
        _title(group[0], f"{name[-30:]}\n{original.width} x {original.height}")
        for view, params in enumerate(drawn):
            colour = _COLOURS[view % len(_COLOURS)]
            box = Rectangle(
                (params.left[i], params.top[i]),
                params.width[i],
                params.height[i],
                fill=False,
                color=colour,
                linewidth=2,
            )
            group[0].add_patch(box)
            group[1 + view].imshow(batch.views[view][i].permute(1, 2, 0).numpy())
            area = params.height[i] * params.width[i] / (original.width * original.height)
            _title(group[1 + view], f"view {view + 1}: crop {area:.0%}\n{applied(params, i)}", colour)
    return figure


def applied(params: SampleParams, i: int) -> str:
    """What sample `i` was given after its crop, in order of application; of the jitter, the factors."""
    factors = (params.brightness, params.contrast, params.saturation, params.hue)
    words = []
    if params.jitter[i]:
        steps = [f"{_OPERATIONS[k]} {factors[k][i]:{'+.2f' if k == 3 else '.2f'}}" for k in params.order[i]]
        words += [", ".join(steps[:2]), ", ".join(steps[2:])]
    names = ("grayscale", f"blur {params.sigma[i]:.2f}", "solarize", "flip")
    coins = (params.grayscale, params.blur, params.solarize, params.flip)
    words.append(", ".join(name for name, coin in zip(names, coins, strict=True) if coin[i]))
    return "\n".join(word for word in words if word)


def _title(cell: Axes, text: str, colour: str = "black") -> None:
    shown = os.fsencode(text).decode(errors="replace")  # a file's name may be no UTF-8, and hold a "$"
    cell.set_title(shown, fontsize=8.5, color=colour, loc="left", parse_math=False)


if __name__ == "__main__":
    matplotlib.use("Agg")
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
