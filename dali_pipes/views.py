"""What a view is, as data: the DALI graph, the torchvision reference and the preview all read the same `ViewSpec`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of values in [0, 1], as torchvision's Normalize takes them
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViewSpec:
    """One chain: crop ▸ colour jitter ▸ grayscale ▸ blur ▸ solarize ▸ flip, each in torchvision's and Pillow's terms.

    Probabilities are in [0, 1]. The strengths are `torchvision.transforms.ColorJitter`'s arguments: a factor is drawn
    from [1 - s, 1 + s], not below 0; `hue` is in turns, at most 0.5. `sigma` is the radius of Pillow's `GaussianBlur`,
    in pixels of the view. Defaults are view 1 of MoCo v3 (Chen, Xie, He 2021, appendix A; BYOL's chain).

    Raises:
        ValueError: a number lies outside its range.
    """

    size: int = 224  # side of the square view, pixels
    crop_scale: tuple[float, float] = (0.08, 1.0)  # crop area as a share of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    jitter: float = 0.8  # probability of the four colour operations, in random order
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2  # probability
    blur: float = 1.0  # probability
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0  # probability
    solarize_threshold: int = 128  # values from here on are inverted
    flip: float = 0.5  # probability

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"view size {self.size} is not a size in pixels; use 224")
        for name in ("jitter", "grayscale", "blur", "solarize", "flip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} probability {getattr(self, name)} is outside [0, 1]")
        for name, low, high in _RANGES:
            first, last = getattr(self, name)
            if not low < first <= last <= high:
                raise ValueError(f"{name} {(first, last)} is not a range within ({low}, {high}]")
        for name, most in _STRENGTHS.items():
            if not 0.0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} strength {getattr(self, name)} is outside [0, {most}]")


_RANGES = (("crop_scale", 0.0, 1.0), ("crop_ratio", 0.0, 100.0), ("sigma", 0.0, 100.0))
_STRENGTHS: Mapping[str, float] = MappingProxyType(
    {"brightness": 10.0, "contrast": 10.0, "saturation": 10.0, "hue": 0.5}
)


@dataclass(frozen=True)
class Recipe:
    """The views drawn from each image, in the order in which `Batch.views` holds them."""

    views: tuple[ViewSpec, ...]

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("a recipe needs at least one view")

    def scaled(self, image_size: int) -> "Recipe":
        """The same recipe with its largest view `image_size` pixels wide and the others in proportion.

        Blur keeps its sigma in pixels: the reference has one recipe and one size, and names no rule for others.

        Raises:
            ValueError: `image_size` is below 1.
        """
        if image_size < 1:
            raise ValueError(f"image size {image_size} is below 1; use 224, for instance")
        largest = max(view.size for view in self.views)
        return Recipe(tuple(replace(v, size=max(1, round(v.size * image_size / largest))) for v in self.views))

    def with_crop_min(self, crop_min: float) -> "Recipe":
        """The same recipe with crops of at least `crop_min` of the image's area (the reference's `--crop-min`).

        Raises:
            ValueError: `crop_min` is not above 0, or above the largest crop of a view.
        """
        return Recipe(tuple(replace(v, crop_scale=(crop_min, v.crop_scale[1])) for v in self.views))


MOCO_V3 = Recipe((ViewSpec(blur=1.0, solarize=0.0), ViewSpec(blur=0.1, solarize=0.2)))
"""The two asymmetric chains of the reference. Its ViT runs crop from 0.08 of the area, its ResNet-50 runs from 0.2."""

MOCO_V2 = Recipe((ViewSpec(crop_scale=(0.2, 1.0), saturation=0.4, blur=0.5),) * 2)
"""Two views of one chain: MoCo's crops and jitter with SimCLR's blur (Chen, Fan, Girshick, He 2020)."""

SIMCLR = Recipe((ViewSpec(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5),) * 2)
"""Two views of one chain, at colour strength 1 (Chen, Kornblith, Norouzi, Hinton 2020, appendix A).

There the blur's kernel is cut off at a tenth of the view, 23 pixels; here it is Pillow's, as everywhere.
"""


def multi_crop(
    n_local: int = 8,
    local_size: int = 96,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> Recipe:
    """Two global views, then `n_local` smaller views of smaller crops, as in DINO.

    The idea is SwAV's (Caron et al. 2020); sizes, chains and crop scales are those of DINO (Caron et al. 2021, and the
    defaults of its release). Its colours are BYOL's: view 1 always blurred, view 2 one time
    in ten and solarized one time in five, local views one time in two. It resizes crops by a cubic kernel; here all
    are resized by a triangle, as MoCo v3's.

    Args:
        n_local: number of local views, 0 or more.
        local_size: their side, pixels; that of the global ones is 224. `Recipe.scaled` keeps the proportion.
        global_scale: crop area as a share of the image; DINO's longest runs take (0.25, 1).
        local_scale: likewise; then (0.05, 0.25).

    Raises:
        ValueError: `n_local` is below 0, or another number out of range.
    """
    if n_local < 0:
        raise ValueError(f"{n_local} local views are too few; use 0 or more")
    large = tuple(replace(view, crop_scale=global_scale) for view in MOCO_V3.views)
    return Recipe(large + (ViewSpec(size=local_size, crop_scale=local_scale, blur=0.5),) * n_local)
