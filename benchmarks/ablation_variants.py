"""What an ablation compares: a recipe without one augmentation, with one alone, and with one at several strengths."""

from dataclasses import replace

from dali_pipes import MOCO_V3, Recipe, ViewSpec

AUGMENTATIONS = ("jitter", "grayscale", "blur", "solarize", "flip")
ALL, NONE = "all on", "crops only"
BOTH = "both views"


def recipes(per_view: bool) -> dict[str, Recipe]:
    """MoCo v3's two views together and, if asked for, each by itself."""
    alone_each = {f"view {i + 1} alone": Recipe((view,)) for i, view in enumerate(MOCO_V3.views)}
    return {BOTH: MOCO_V3, **(alone_each if per_view else {})}


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """All on, crops only, and for each augmentation that the recipe uses: without it, and it alone."""
    found = {ALL: recipe, NONE: bare(recipe)}
    for name in used(recipe):
        found[f"without {name}"] = off(recipe, name)
        found[f"only {name}"] = alone(recipe, name)
    return found


def sweeps() -> dict[str, dict[str, Recipe]]:
    """One view's crop and one augmentation, where what it costs may depend on how often or how strongly it applies."""
    crop = without(MOCO_V3.views[0])
    shares = (0.0, 0.1, 0.5, 1.0)
    return {
        "blur, by probability": {f"{p:g}": Recipe((replace(crop, blur=p),)) for p in shares},
        "blur at probability 1, by sigma": {
            f"{s:g} px": Recipe((replace(crop, blur=1.0, sigma=(s, s)),)) for s in (0.1, 0.5, 1.0, 2.0)
        },
        "jitter, by probability": {f"{p:g}": Recipe((replace(crop, jitter=p),)) for p in (0.0, 0.4, 0.8, 1.0)},
    }


def used(recipe: Recipe) -> list[str]:
    """The augmentations that some view applies."""
    return [name for name in AUGMENTATIONS if any(getattr(view, name) > 0 for view in recipe.views)]


def off(recipe: Recipe, name: str) -> Recipe:
    """The recipe without one augmentation."""
    return Recipe(tuple(_with(view, name, 0.0) for view in recipe.views))


def alone(recipe: Recipe, name: str) -> Recipe:
    """The recipe's crops and one augmentation, as often as it has it."""
    return Recipe(tuple(_with(without(view), name, getattr(view, name)) for view in recipe.views))


def bare(recipe: Recipe) -> Recipe:
    """The recipe's crops and nothing else."""
    return Recipe(tuple(without(view) for view in recipe.views))


def without(view: ViewSpec) -> ViewSpec:
    """The view's crop and nothing else; what is never applied is not in DALI's graph."""
    return replace(view, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0, flip=0.0)


def _with(view: ViewSpec, name: str, probability: float) -> ViewSpec:
    return replace(view, **{name: probability})  # type: ignore[arg-type]
