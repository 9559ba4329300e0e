"""What an ablation leaves out, and whether its parts make the whole, on costs that are known."""

import pytest

from benchmarks import ablation
from benchmarks.results import Measurement


def test_an_ablation_knows_what_a_recipe_uses():
    recipe = ablation.MOCO_V3
    assert ablation.used(recipe) == list(ablation.AUGMENTATIONS)
    # View 1 never solarizes, and so has nothing to leave out.
    assert "solarize" not in ablation.used(ablation.Recipe(recipe.views[:1]))
    assert [view.blur for view in ablation.off(recipe, "blur").views] == [0.0, 0.0]
    only = ablation.alone(recipe, "blur").views
    assert [view.blur for view in only] == [view.blur for view in recipe.views]
    assert all(view.jitter == view.grayscale == view.solarize == view.flip == 0 for view in only)


def runs(**cpu):
    """Measurements by (variant, quantity), as the benchmark has them: three rounds of CPU time a variant."""
    return {
        (name.replace("_", " "), "CPU-ms/image"): Measurement(
            "both views", name.replace("_", " "), "CPU-ms/image", tuple(values), "lower"
        )
        for name, values in cpu.items()
    }


def test_parts_that_add_up_leave_nothing():
    text = ablation.explanation(
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
    assert text.startswith("both views: all on is 11.0 CPU-ms/image.")
    assert text.count("nothing, within the spread") == 2


@pytest.mark.parametrize(("saved", "verdict"), [(1.0, "more than by this count"), (5.0, "less than by this count")])
def test_parts_that_do_not_add_up_say_which_way(saved, verdict):
    whole = [10.0, 10.1, 10.2]
    less = [value - saved for value in whole]
    measured = runs(all_on=whole, crops_only=[4.0, 4.1, 4.2], without_a=less, without_b=less)
    text = ablation.explanation("x", measured, "CPU-ms/image")
    assert verdict in text
