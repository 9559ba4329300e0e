"""Backbones by name: the reference's vision transformers, torchvision's ResNets, any model of timm.

All come without a classifier. In its place MoCoV3 puts the projector, so that state-dict names are the reference's
(`blocks.0.attn.qkv.weight`, `head.0.weight`; `layer1.0.conv1.weight`, `fc.0.weight`); those of timm models are
`trunk.*`, `head.*`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torchvision.models
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet

from model.vision_transformer import VISION_TRANSFORMERS, check_divisible, vision_transformer

Family = Literal["vit", "resnet"]
ImageSize = int | tuple[int, int]

RESNETS = tuple(
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if torchvision.models.get_model_builder(name).__module__ == ResNet.__module__
)


@dataclass(frozen=True)
class Backbone:
    """A network that maps (N, 3, H, W) to features (N, feature_dim), an nn.Identity in its head's place.

    family: "vit" for transformers, "resnet" for convolutional networks and MLPs.
    """

    module: nn.Module
    feature_dim: int
    family: Family

    def with_head(self, head: nn.Module) -> nn.Module:
        """The same network with `head` in that place."""
        setattr(self.module, _head_name(self.module), head)
        return self.module


class Headed(nn.Module):
    """A model of timm, whose heads have many names and shapes, with one head behind it: head(trunk(x))."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images to what the head makes of their features."""
        return self.head(self.trunk(x))


def build_backbone(arch: str, image_size: ImageSize = 224, overrides: Mapping[str, Any] | None = None) -> Backbone:
    """The backbone called `arch`, with fresh weights.

    image_size: side, or (height, width), in pixels. overrides: keyword arguments for the constructor of timm's
    VisionTransformer (vit_small, vit_base, vit_conv_small, vit_conv_base: embed_dim, depth, num_heads, ...), of
    torchvision's ResNet, or of the timm model. Raises ValueError for an unknown name, for an override the constructor
    refuses, and for an image size that the patch size does not divide.
    """
    kwargs = dict(overrides or {})
    try:
        if arch in VISION_TRANSFORMERS:
            module = vision_transformer(arch, image_size, **kwargs)
            return Backbone(module, module.embed_dim, "vit")
        if arch in RESNETS:
            return _torchvision_resnet(arch, kwargs)
        if timm.is_model(arch):
            return _timm_model(arch, image_size, kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"--backbone {kwargs} does not fit --arch {arch}: {error}") from error
    known = [*VISION_TRANSFORMERS, *RESNETS, *timm.list_models()]
    nearest = ", ".join(dict.fromkeys(difflib.get_close_matches(arch, known, n=3, cutoff=0)))
    raise ValueError(f"--arch {arch} is not known; nearest: {nearest}")


def features(module: nn.Module, x: Tensor) -> Tensor:
    """Features (N, feature_dim) of a network of this file, whatever head it carries; x: (N, 3, H, W)."""
    if isinstance(module, Headed):
        return module.trunk(x)
    if isinstance(module, VisionTransformer):
        return module.forward_head(module.forward_features(x), pre_logits=True)
    for name, layer in module.named_children():
        if name != _head_name(module):
            x = layer(x)
    return x.flatten(1)


def head(module: nn.Module) -> nn.Module:
    """What a network of this file carries behind its features."""
    return getattr(module, _head_name(module))


def state_without_head(module: nn.Module) -> dict[str, Tensor]:
    """State of a network of this file as the model of timm or torchvision names it, without the head."""
    if isinstance(module, Headed):
        return module.trunk.state_dict()
    prefix = _head_name(module) + "."
    return {name: value for name, value in module.state_dict().items() if not name.startswith(prefix)}


def load_without_head(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `state_without_head` gave into a network whose head is still an nn.Identity."""
    (module.trunk if isinstance(module, Headed) else module).load_state_dict(state)


def freeze_patch_projection(module: nn.Module) -> None:
    """No gradient for a patch projection that is a single convolution; any other stem stays as it is."""
    trunk = module.trunk if isinstance(module, Headed) else module
    projection = getattr(getattr(trunk, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Conv2d):
        projection.requires_grad_(False)


def checkpoint_activations(module: nn.Module, arch: str) -> None:
    """Have a network of this file keep only the inputs of its blocks, and compute the blocks again for the gradient.

    Raises ValueError if a block holds a batch norm, whose running statistics the second computation would move again,
    or if timm's model called `arch` has no such form.
    """
    trunk = module.trunk if isinstance(module, Headed) else module
    for name, part in trunk.named_modules():
        # A stem before the blocks is never computed twice, nor is the projector behind them.
        if isinstance(part, _BatchNorm) and not name.startswith(("patch_embed.", _head_name(trunk) + ".")):
            raise ValueError(
                f"--checkpoint-activations with --arch {arch}: its blocks hold batch norm ({name}), whose running "
                "statistics would move twice a step; leave the flag out, or use an --arch without, such as vit_small"
            )
    try:
        trunk.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError):  # no such method, or one that refuses
        raise ValueError(f"--checkpoint-activations: timm's {arch} does not support it; leave the flag out") from None


def _head_name(module: nn.Module) -> str:
    return "fc" if isinstance(module, ResNet) else "head"


def _torchvision_resnet(arch: str, kwargs: dict[str, Any]) -> Backbone:
    # Residual branches that start at zero are part of the reference's pre-training, not of torchvision's defaults.
    module = torchvision.models.get_model(arch, **{"zero_init_residual": True, **kwargs})
    feature_dim = module.fc.in_features
    module.fc = nn.Identity()
    return Backbone(module, feature_dim, "resnet")


def _timm_model(arch: str, image_size: ImageSize, kwargs: dict[str, Any]) -> Backbone:
    config = timm.get_pretrained_cfg(arch)
    if config is not None and config.fixed_input_size:
        kwargs = {"img_size": image_size, **kwargs}
    trunk = timm.create_model(arch, num_classes=0, **kwargs)
    projection = getattr(getattr(trunk, "patch_embed", None), "proj", None)
    # Patches that overlap, as PVT's, take any size.
    if isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride:
        check_divisible(arch, image_size, getattr(trunk.patch_embed, "patch_size", projection.kernel_size[0]))
    family: Family = "vit" if any(map(_has_heads, trunk.modules())) else "resnet"
    return Backbone(Headed(trunk), trunk.head_hidden_size, family)


def _has_heads(part: nn.Module) -> bool:
    """Whether it is attention over positions; the channel attention of convolutional networks has no heads."""
    return isinstance(getattr(part, "num_heads", getattr(part, "heads", None)), int)
