"""Backbones by name: the reference's vision transformers, torchvision's ResNets, any model of timm.

All come without a classifier; its place is where MoCoV3 puts the projector, so that state-dict names are the
reference's (`blocks.0.attn.qkv.weight`, `head.0.weight`; `layer1.0.conv1.weight`, `fc.0.weight`).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torchvision.models
from torch import Tensor, nn
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
    """A network that maps (N, 3, H, W) to features (N, feature_dim).

    family: "vit" for transformers, "resnet" for convolutional networks. classifier: name of the submodule in whose
    place an nn.Identity stands.
    """

    module: nn.Module
    feature_dim: int
    family: Family
    classifier: str

    def with_head(self, head: nn.Module) -> nn.Module:
        """The network with `head` in the classifier's place; the same object."""
        self.module.set_submodule(self.classifier, head)
        return self.module


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
            return Backbone(module, module.embed_dim, "vit", "head")
        if arch in RESNETS:
            return _torchvision_resnet(arch, kwargs)
        if timm.is_model(arch):
            return _timm_model(arch, image_size, kwargs)
    except TypeError as error:
        raise ValueError(f"--backbone {kwargs} does not fit --arch {arch}: {error}") from error
    known = [*VISION_TRANSFORMERS, *RESNETS, *timm.list_models()]
    nearest = ", ".join(dict.fromkeys(difflib.get_close_matches(arch, known, n=3, cutoff=0)))
    raise ValueError(f"--arch {arch} is not known; nearest: {nearest}")


def features(module: nn.Module, x: Tensor) -> Tensor:
    """Features (N, feature_dim) of a network of this file, whatever head it carries; x: (N, 3, H, W)."""
    if not isinstance(module, ResNet):
        return module.forward_head(module.forward_features(x), pre_logits=True)  # type: ignore[operator]
    for name, layer in module.named_children():
        if name != "fc":
            x = layer(x)
    return x.flatten(1)


def _torchvision_resnet(arch: str, kwargs: dict[str, Any]) -> Backbone:
    # A residual branch that starts at zero is part of the reference's pre-training, though not of torchvision's
    # default.
    module = torchvision.models.get_model(arch, **{"zero_init_residual": True, **kwargs})
    feature_dim = module.fc.in_features
    module.fc = nn.Identity()
    return Backbone(module, feature_dim, "resnet", "fc")


def _timm_model(arch: str, image_size: ImageSize, kwargs: dict[str, Any]) -> Backbone:
    config = timm.get_pretrained_cfg(arch)
    if config is not None and config.fixed_input_size:
        kwargs = {"img_size": image_size, **kwargs}
    module = timm.create_model(arch, num_classes=0, **kwargs)
    patch_embed = getattr(module, "patch_embed", None)
    if patch_embed is not None and hasattr(patch_embed, "patch_size"):
        check_divisible(arch, image_size, patch_embed.patch_size)
    classifier = module.pretrained_cfg.get("classifier")
    if not isinstance(classifier, str) or not isinstance(module.get_submodule(classifier), nn.Identity):
        raise ValueError(f"--arch {arch} has no single classifier ({classifier!r}) that the projector could replace")
    return Backbone(module, module.head_hidden_size, _family(module), classifier)


def _family(module: nn.Module) -> Family:
    """Transformers have attention with heads; the channel attention of convolutional networks has none."""
    return "vit" if any(hasattr(part, "num_heads") for part in module.modules()) else "resnet"
