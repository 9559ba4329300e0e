"""JPEGs to measure on where there are no photos: ImageNet's sizes, and content that costs a decoder as much as theirs.

What a decoder's time depends on is pixels, bytes and chroma subsampling. The pictures are "dead leaves" (overlapping
shapes of all sizes, whose edges and spectrum are those of natural images) under 1/f noise, encoded 4:2:0.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.pictures import VERSION, file_name, write
from dali_pipes import DatasetIndex
from dali_pipes.cores import usable_cores

FOLDER = Path("data/benchmark")
MARKER = "generated.json"


def generated(folder: Path, count: int, scale: float = 1.0) -> DatasetIndex:
    """An index of `count` generated JPEGs in `folder`/v1-<scale>; what is there already is kept.

    Args:
        folder: is created; the files depend on number and scale alone.
        count: images, 1 or more.
        scale: of width and height against ImageNet's sizes.

    Raises:
        OSError: the folder cannot be written.
    """
    tree = folder / f"v{VERSION}-{scale:g}" / "images"
    tree.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(count) if not (tree / file_name(i)).exists()]
    if missing:
        # A fresh interpreter a worker: this process may already run DALI's threads, which a fork would cut off.
        with ProcessPoolExecutor(usable_cores(), get_context("spawn")) as pool:
            for _ in pool.map(partial(write, tree=tree, scale=scale), missing, chunksize=8):
                pass
        (tree.parent / MARKER).write_text(json.dumps({"version": VERSION, "scale": scale}) + "\n")
    return first(DatasetIndex.scan(tree), count)


def first(index: DatasetIndex, count: int) -> DatasetIndex:
    """`count` rows of an index, from its beginning and, where it has fewer, over and over."""
    return index.at(np.arange(count) % len(index))


def describe(index: DatasetIndex) -> dict[str, float]:
    """Mean size of the distinct files of an index, for the result's JSON."""
    paths = sorted(set(index.paths))
    return {
        "files": len(paths),
        "mean_width": round(float(index.widths.mean()), 1),
        "mean_height": round(float(index.heights.mean()), 1),
        "mean_kilobytes": round(sum(os.path.getsize(path) for path in paths) / len(paths) / 1000, 1),
    }
