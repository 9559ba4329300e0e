"""The loader with the fused kernels, whole: DALI decodes and crops, Triton's interpreter does the rest.

Triton decides at its import whether it interprets, so that is done in a process of its own.
"""

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipes import MOCO_V2, MOCO_V3, SIMCLR, DatasetIndex, Recipe, ViewLoader, ViewSpec, multi_crop, sample_params
from dali_pipes.augment import why_not_fused
from dali_pipes.gap import Gap
from dali_pipes.reference import ReferenceViews, reference_view
from tests.dali_pipes.odd_files import encoded, picture
from tests.dali_pipes.test_fused import normalised

RECIPES = {"moco-v3": MOCO_V3, "moco-v2": MOCO_V2, "simclr": SIMCLR, "multi-crop": multi_crop(1)}
COUNT, BATCH, STEPS = 10, 3, 3  # one image is left over
BATCHES = STEPS + 2
SIZE = 8
SHARP = Recipe((MOCO_V3.views[1],) * 2)  # rarely blurred: a blur costs the interpreter half a second an image


def read(index, recipe, parts, options, state=None):
    """[(rows, views as bytes, NHWC)], what was said, and the last state.

    `parts`: how many batches a loader gives before another one goes on from its state; `state`: where the first begins.
    """
    batches = []
    lines: list[str] = []
    for part in parts:
        loader = ViewLoader(index, recipe, num_threads=1, on_failed=lines.append, **{"image_size": SIZE, **options})
        if state is not None:
            loader.load_state_dict(state)
        for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), part):
            assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
            views = [view.permute(0, 2, 3, 1).contiguous().view(torch.uint8).numpy() for view in batch.views]
            batches.append((batch.indices.tolist(), views))
        state = loader.state_dict()
        loader.close()
    return batches, lines, state


@pytest.fixture(scope="module")
def fused():
    """fused(index, recipe, parts, batch_size=…, …): what `read` gives for the fused kernels, in the other process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()

        def call(index, recipe=SHARP, parts=(1,), state=None, **options):
            return pool.submit(read, index, recipe, parts, {"augment": "fused", **options}, state).result()

        yield call


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        (root / f"{i:02d}.jpg").write_bytes(encoded(picture(i), "JPEG"))
    return root


@pytest.fixture(scope="module")
def index(tree):
    return DatasetIndex.scan(tree)


@pytest.fixture(scope="module")
def undisturbed(fused, index):
    """An epoch and the beginning of the next, in one go."""
    return fused(index, parts=(BATCHES,), batch_size=BATCH)[0]


def assert_same(some, others):
    assert [rows for rows, _ in some] == [rows for rows, _ in others]
    for (_, views), (_, other_views) in zip(some, others, strict=True):
        for view, other in zip(views, other_views, strict=True):
            np.testing.assert_array_equal(view, other)


def crops_only(recipe):
    """The recipe without what follows the crop, which is drawn alike: each number has an address of its own."""
    nothing = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0, "flip": 0.0}
    return Recipe(tuple(replace(spec, **nothing) for spec in recipe.views))


def after_the_crop(spec, crops, params):
    """Pillow's and torchvision's chain on crops that are there already."""
    whole = np.full(len(params), spec.size)
    params = replace(params, top=whole * 0, left=whole * 0, height=whole, width=whole)
    return np.stack(
        [np.asarray(reference_view(Image.fromarray(crop), spec, params, i)) for i, crop in enumerate(crops)]
    )


@pytest.mark.parametrize(
    "name", ["moco-v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moco-v2", "simclr", "multi-crop"))]
)
def test_every_recipe_equals_pillow(fused, photos, name):
    """On the same crops every byte; from the files on, crop included, within the bounds that hold for all back ends."""
    recipe, options = RECIPES[name], {"batch_size": 4, "seed": 5, "image_size": 32}
    ((rows, views),) = fused(photos, recipe, **options)[0]
    ((same_rows, crops),) = read(photos, crops_only(recipe), (1,), options)[0]
    ((also_same_rows, by_dali),) = read(photos, recipe, (1,), options)[0]
    assert rows == same_rows == also_same_rows
    scaled = recipe.scaled(32)
    whole_chain = [ReferenceViews(photos, scaled, seed=5)[row][0] for row in rows]
    for number, spec in enumerate(scaled.views):
        params = sample_params(spec, number, 5, 0, rows, photos.heights[rows], photos.widths[rows])
        np.testing.assert_array_equal(views[number], after_the_crop(spec, crops[number], params))
        theirs = [each[number].permute(1, 2, 0).numpy() for each in whole_chain]
        for gap in (Gap.between(views[number], theirs), Gap.between(views[number], by_dali[number])):
            assert gap.mean < 0.05
            assert gap.by_more < 0.005


def test_normalised_output(fused, photos):
    options = {"batch_size": 2, "seed": 1}
    ((_, raw),) = fused(photos, **options)[0]
    for output in ("float16", "bfloat16"):
        ((_, views),) = fused(photos, output=output, **options)[0]
        for view, mine in zip(raw, views, strict=True):
            np.testing.assert_array_equal(mine, normalised(view, output).view(torch.uint8).numpy())


@pytest.mark.parametrize("stop", [1, STEPS + 1])
def test_resumes_with_the_very_next_batch(fused, index, undisturbed, stop):
    """The state is taken while more batches are in flight, each with its parameters."""
    again, _, _ = fused(index, parts=(stop, BATCHES - stop), batch_size=BATCH)
    assert_same(again, undisturbed)


def test_more_ranks_go_on_where_one_rank_stopped(fused, index, undisturbed):
    """From its last batch of the epoch, with the next epoch's in flight: each rank has its part of the same batches."""
    state = {"epoch": 0, "step": STEPS - 1, "global_batch": BATCH}
    for rank in range(BATCH):
        part, _, _ = fused(index, parts=(3,), state=state, batch_size=1, rank=rank, world_size=BATCH)
        mine = slice(rank, rank + 1)
        assert_same(part, [(rows[mine], [view[mine] for view in views]) for rows, views in undisturbed[STEPS - 1 :]])


def test_a_bad_file_takes_no_other_slot_along(fused, tree, undisturbed):
    """Its own parameters go with the image that stands in; and the run is continued from a state that knows of it."""
    index = DatasetIndex.scan(tree)
    victim = undisturbed[1][0][2]
    path = tree / index.names[victim]
    whole = path.read_bytes()
    path.write_bytes(whole[:400])
    try:
        batches, lines, state = fused(index, parts=(2, BATCHES - 2), batch_size=BATCH)
    finally:
        path.write_bytes(whole)
    assert state["failed"] == [victim]
    (line,) = lines
    assert line.startswith(f"{path}: ")
    expected = [(list(rows), [view.copy() for view in views]) for rows, views in undisturbed]
    for (rows, views), further in zip(expected, undisturbed[1:], strict=False):
        if victim in rows:  # in the second epoch no earlier than its third batch
            slot = rows.index(victim)
            rows[slot] = further[0][slot]
            for view, other in zip(views, further[1], strict=True):
                view[slot] = other[slot]
    assert victim not in undisturbed[STEPS][0] + undisturbed[STEPS + 1][0]
    assert_same(batches, expected)


def test_parameters_are_drawn_once_a_batch(monkeypatch, index):
    """With kernels that do nothing, in this process: the crops' and the kernels' numbers come of one draw."""
    drawn, used = [], []

    def counting(spec, view, seed, epoch, rows, *sizes):
        drawn.append(sample_params(spec, view, seed, epoch, rows, *sizes))
        return drawn[-1]

    def launch(view, crops, params):
        used.append(params)
        return crops.permute(0, 3, 1, 2)

    monkeypatch.setattr("dali_pipes.augment.why_not_fused", lambda device, recipe: None)
    monkeypatch.setattr("dali_pipes.fused._kernels", lambda device: None)
    monkeypatch.setattr("dali_pipes.plan.sample_params", counting)
    monkeypatch.setattr("dali_pipes.fused.FusedView._launch", launch)
    loader = ViewLoader(index, batch_size=BATCH, image_size=SIZE, num_threads=1, augment="fused")
    for _ in range(2):
        for batch in loader:
            assert used[-2:] == [params for params in drawn if params is used[-2] or params is used[-1]]
            sizes = index.heights[batch.indices], index.widths[batch.indices]
            again = sample_params(MOCO_V3.views[1], 1, 0, (len(used) - 1) // (2 * STEPS), batch.indices, *sizes)
            np.testing.assert_array_equal(used[-1].sigma, again.sigma)
    assert len(drawn) == 2 + len(used) + 2 * 2  # two for the names of the inputs; two batches read ahead


def test_wrong_use_is_one_line(index):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"augment": "fast"}, "augment 'fast' is neither fused nor dali"),
        ({"augment": "fused"}, "augment fused: device cpu runs no Triton kernels; use augment dali"),
        ({"output": "bfloat16"}, "output 'bfloat16' is none of uint8, float16, float32"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            ViewLoader(index, batch_size=BATCH, image_size=SIZE, **options)


def test_what_keeps_the_kernels_from_running_is_named(monkeypatch, tmp_path):
    gpu = torch.device("cuda", 0)
    wide = Recipe((ViewSpec(sigma=(0.1, 3.0)),))
    assert "sigma 3 is too wide" in str(why_not_fused(gpu, wide))
    assert "view size 4000 is too large" in str(why_not_fused(gpu, MOCO_V3.scaled(4000)))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not_fused(gpu, MOCO_V3) == "no C compiler (gcc or clang) on the PATH"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_fused(gpu, MOCO_V3) == "no triton, which comes with torch's CUDA builds"
