"""The same parameters applied by torchvision to Pillow images: the oracle of the tests and of the equality table."""

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import Dataset

from dali_pipes.index import DatasetIndex
from dali_pipes.sampling import SampleParams, sample_params
from dali_pipes.views import Recipe, ViewSpec

_ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def load_image(path: str) -> Image.Image:
    """Decodes a file as torchvision's ImageFolder does: RGB, an EXIF orientation not applied."""
    with open(path, "rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def reference_view(image: Image.Image, spec: ViewSpec, params: SampleParams, i: int) -> Image.Image:
    """Sample `i` of `params` applied to an RGB image: what MoCo v3's transforms do once their dice are cast."""
    box = [int(side[i]) for side in (params.top, params.left, params.height, params.width)]
    view = F.resized_crop(image, *box, [spec.size, spec.size], F.InterpolationMode.BILINEAR)
    if params.jitter[i]:
        for operation in params.order[i]:
            if operation != 3 or spec.hue > 0:  # ColorJitter leaves out a hue of 0, which Pillow's HSV makes a change
                view = adjusted(view, params, i, operation)
    if params.grayscale[i]:
        view = F.to_grayscale(view, num_output_channels=3)
    if params.blur[i]:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(params.sigma[i])))
    if params.solarize[i]:
        view = ImageOps.solarize(view, spec.solarize_threshold)
    if params.flip[i]:
        view = F.hflip(view)
    return view


def adjusted(image: Image.Image, params: SampleParams, i: int, operation: int) -> Image.Image:
    """One of the colour operations: 0 brightness 1 contrast 2 saturation 3 hue."""
    factors = (params.brightness, params.contrast, params.saturation, params.hue)
    return _ADJUST[operation](image, float(factors[operation][i]))


class ReferenceViews(Dataset):
    """The views that a `ViewLoader` of the same index, recipe and seed gives in one epoch, one image at a time.

    An item is (views, row): a tuple of uint8 tensors (3, S, S), and the row of the index.
    """

    def __init__(self, index: DatasetIndex, recipe: Recipe, seed: int = 0, epoch: int = 0) -> None:
        self.index, self.recipe, self.seed, self.epoch = index, recipe, seed, epoch

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> tuple[tuple[torch.Tensor, ...], int]:
        image = load_image(self.index.path(row))
        sizes = ([image.height], [image.width])
        views = []
        for number, spec in enumerate(self.recipe.views):
            params = sample_params(spec, number, self.seed, self.epoch, [row], *sizes)
            view = reference_view(image, spec, params, 0)
            views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))
        return tuple(views), row
