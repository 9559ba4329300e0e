"""What an ablation leaves out, and whether its parts make the whole, on costs that are known."""

import pytest
import torch

from benchmarks.ablation_costs import ALONE, LEFT_OUT, costs, explanation, in_milliseconds
from benchmarks.ablation_step import step_cost
from benchmarks.ablation_variants import AUGMENTATIONS, alone, off, recipes, sweeps, used, variants
from benchmarks.results import Measurement
from dali_pipes import MOCO_V3, DatasetIndex, Recipe
from trainer.config import replace
from trainer.presets import PRESETS


def test_an_ablation_knows_what_a_recipe_uses():
    assert used(MOCO_V3) == list(AUGMENTATIONS)
    # View 1 never solarizes, and so has nothing to leave out.
    assert "solarize" not in used(Recipe(MOCO_V3.views[:1]))
    assert [view.blur for view in off(MOCO_V3, "blur").views] == [0.0, 0.0]
    only = alone(MOCO_V3, "blur").views
    assert [view.blur for view in only] == [view.blur for view in MOCO_V3.views]
    assert all(view.jitter == view.grayscale == view.solarize == view.flip == 0 for view in only)


def test_every_augmentation_is_left_out_and_alone_for_both_views_and_each():
    for recipe in recipes(per_view=True).values():
        kinds = [name.partition(" ")[0] for name in variants(recipe)]
        assert kinds.count("without") == kinds.count("only") == len(used(recipe))
    assert list(recipes(per_view=False)) == ["both views"]


def test_sweeps_vary_one_thing():
    for members in sweeps().values():
        views = [recipe.views[0] for recipe in members.values()]
        assert all(len(recipe.views) == 1 for recipe in members.values())
        varied = {name for view in views for name, value in vars(view).items() if value != vars(views[0])[name]}
        assert len(varied) == 1


def runs(**cpu):
    """Measurements by (variant, quantity), as the benchmark has them: three rounds of CPU time a variant."""
    return {
        (name.replace("_", " "), "CPU-ms/image"): Measurement(
            "both views", name.replace("_", " "), "CPU-ms/image", tuple(values), "lower"
        )
        for name, values in cpu.items()
    }


def test_rates_become_times_and_variants_details():
    taken = [
        Measurement("g", name, "images/s", (500.0, 250.0), "higher") for name in ("all on", "crops only", "only blur")
    ]
    found = in_milliseconds(taken)
    assert found["all on", "ms/image"].values == (2.0, 4.0)
    assert [m.detail for m in found.values()] == [False, False, True]


def test_costs_are_differences_of_a_round_both_ways_and_shares_of_a_step():
    measured = runs(
        all_on=[10.0, 12.0], crops_only=[4.0, 5.0], without_blur=[7.0, 9.5], only_blur=[6.0, 8.0]
    )  # fmt: skip
    found = {m.quantity: m for m in costs("g", measured, ["CPU-ms/image"], step=50.0, headline=True)}
    assert found[f"CPU-ms/image {LEFT_OUT}"].values == (3.0, 2.5)
    assert found[f"CPU-ms/image {ALONE}"].values == (2.0, 3.0)
    assert found["% of a step"].values == (6.0, 5.0)
    assert [m.headline for m in found.values()] == [True, False, False]
    assert {m.name for m in found.values()} == {"blur"}


def test_parts_that_add_up_leave_nothing():
    text = explanation(
        "both views",
        runs(
            all_on=[10.0, 11.0, 12.0],
            crops_only=[4.0, 5.0, 6.1],  # a slow round is slow for all, and cancels
            without_blur=[6.0, 7.0, 8.0],
            only_blur=[8.0, 9.1, 10.0],
            without_jitter=[8.1, 9.0, 10.0],
            only_jitter=[6.0, 7.0, 8.1],
        ),
        "CPU-ms/image",
    )
    assert text.startswith("both views: all on is 11.0 CPU-ms/image, the crops are 5.00.")
    assert text.count("nothing, within the spread") == 2
    assert "differs" not in text


def test_a_rest_is_traced_to_the_augmentation_whose_two_costs_differ():
    # Beside the blur, jitter costs 4; alone it costs 2: leaving out blames the parts for 2 more than there is.
    whole, crops = [10.0, 10.1, 10.2], [4.0, 4.1, 4.2]
    text = explanation(
        "x",
        runs(
            all_on=whole,
            crops_only=crops,
            without_blur=[value - 4.0 for value in whole],
            only_blur=[value + 4.0 for value in crops],
            without_jitter=[value - 4.0 for value in whole],
            only_jitter=[value + 2.0 for value in crops],
        ),
        "CPU-ms/image",
    )
    assert text.count("together they cost less than by this count") == 1
    assert text.count("nothing, within the spread") == 1
    assert text.endswith("What differs is jitter (4.00 among the others, 2.00 alone).")


@pytest.mark.parametrize(("saved", "verdict"), [(1.0, "more than by this count"), (5.0, "less than by this count")])
def test_parts_that_do_not_add_up_say_which_way(saved, verdict):
    whole, crops = [10.0, 10.1, 10.2], [4.0, 4.1, 4.2]
    less, more = [value - saved for value in whole], [value + saved for value in crops]
    measured = runs(all_on=whole, crops_only=crops, without_a=less, without_b=less, only_a=more, only_b=more)
    text = explanation("x", measured, "CPU-ms/image")
    assert text.count(verdict) == 2
    assert "No single augmentation explains it" in text


def test_the_step_that_shares_are_of_is_measured_and_described(tree):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "moco_dim": 16, "moco_mlp_dim": 32, "image_size": 32}
    config = replace(PRESETS["demo"](), **sizes, data=tree, out=tree, batch_size=4, amp="off", compile="off")
    found = step_cost(config, torch.device("cpu"), DatasetIndex.scan(tree), threads=1, rounds=2)
    assert found.per_image["ms/image"] > 0
    assert found.per_image["CPU-ms/image"] > 0
    assert "depth 1" in found.described
    assert "32 px on a cached batch of 4, amp off, compile off" in found.described
