"""Sources made of torch's DataLoader: the reference recipe's chain on Pillow images, and torchvision v2 on tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from dali_pipes import IMAGENET_MEAN, IMAGENET_STD, DatasetIndex, Recipe, ViewSpec

PREFETCH = 2  # batches a worker, torch's default
BLUR_KERNEL = 23  # a tenth of 224, odd, as in BYOL and SimCLR


class Loader:
    """A DataLoader with its best settings, endless, each batch copied to the device.

    Args:
        chains: from `path` by `open_image` to one tensor a view.
        batch: images of a batch.
        workers: processes.
    """

    def __init__(
        self,
        index: DatasetIndex,
        open_image: Callable[[str], Any],
        chains: Sequence[Callable[[Any], Tensor]],
        batch: int,
        workers: int,
        device: torch.device,
    ) -> None:
        pinned = device.type == "cuda"
        self.burst, self.in_flight = workers, PREFETCH * workers
        self.settings = {
            "batch": batch,
            "workers": workers,
            "persistent_workers": True,
            "pin_memory": pinned,
            "prefetch_factor": PREFETCH,
            "threads_a_worker": 1,
            "output": "float32, normalised",
        }
        self._device = device
        self._loader = DataLoader(
            _Files(index.paths, open_image, chains),
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            pin_memory=pinned,
            persistent_workers=True,
            prefetch_factor=PREFETCH,
        )
        self._iterator: Any = None

    def batches(self) -> Iterator[int]:
        """Batches of epoch after epoch."""
        while True:
            self._iterator = iter(self._loader)
            for views in self._iterator:
                on_device = [view.to(self._device, non_blocking=True) for view in views]
                yield len(on_device[0])

    def close(self) -> None:
        """End the worker processes."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()
        self._loader._iterator = None


class _Files(Dataset[tuple[Tensor, ...]]):
    def __init__(
        self, paths: Sequence[str], open_image: Callable[[str], Any], chains: Sequence[Callable[[Any], Tensor]]
    ) -> None:
        self._paths, self._open, self._chains = list(paths), open_image, chains

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        image = self._open(self._paths[row])
        return tuple(chain(image) for chain in self._chains)


def pillow(
    index: DatasetIndex, recipe: Recipe, batch: int, image_size: int, workers: int, device: torch.device
) -> Loader:
    """torchvision's classic transforms on Pillow images: what the reference recipe trains with."""
    chains = [_pillow_chain(spec, image_size) for spec in recipe.views]
    return Loader(index, _open_pillow, chains, batch, workers, device)


def tensors(
    index: DatasetIndex, recipe: Recipe, batch: int, image_size: int, workers: int, device: torch.device
) -> Loader:
    """torchvision v2 on uint8 tensors, decoded by torchvision."""
    chains = [_tensor_chain(spec, image_size) for spec in recipe.views]
    return Loader(index, _open_tensor, chains, batch, workers, device)


def _pillow_chain(spec: ViewSpec, size: int) -> Callable[[Any], Tensor]:
    jitter = transforms.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, spec.crop_scale, spec.crop_ratio),
            transforms.RandomApply([jitter], spec.jitter),
            transforms.RandomGrayscale(spec.grayscale),
            transforms.RandomApply([_PillowBlur(spec.sigma)], spec.blur),
            transforms.RandomSolarize(spec.solarize_threshold, spec.solarize),
            transforms.RandomHorizontalFlip(spec.flip),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _tensor_chain(spec: ViewSpec, size: int) -> Callable[[Any], Tensor]:
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, spec.crop_scale, spec.crop_ratio, antialias=True),
            v2.RandomApply([jitter], spec.jitter),
            v2.RandomGrayscale(spec.grayscale),
            v2.RandomApply([v2.GaussianBlur(BLUR_KERNEL, spec.sigma)], spec.blur),
            v2.RandomSolarize(spec.solarize_threshold, spec.solarize),
            v2.RandomHorizontalFlip(spec.flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class _PillowBlur:
    """Pillow's GaussianBlur with a radius drawn from `sigma`."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self._low, self._high = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = torch.empty(1).uniform_(self._low, self._high).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def _open_pillow(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _open_tensor(path: str) -> Tensor:
    return decode_image(read_file(path), ImageReadMode.RGB)
