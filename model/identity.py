"""Which architecture, heads and sizes weights have: read from names and shapes, to tell why they do not fit."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.backbones import RESNETS, build_backbone, state_without_head
from model.vision_transformer import VISION_TRANSFORMERS

_ENCODER = "base_encoder."
# Not part of what an architecture is: its length is the image size's.
_POSITIONS = "pos_embed"
_HEADS = ("head.", "fc.")

Shapes = dict[str, torch.Size]


def settings(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a MoCoV3.state_dict() was built with, as far as it shows, under the names of the command's flags.

    embed_dim, depth: of a transformer. image_size: of a transformer with a square grid. heads, moco_dim, moco_mlp_dim:
    of projector and predictor. Number of attention heads, frozen parts and temperature do not show in weights.
    """
    shapes = _encoder(state_dict)
    found: dict[str, Any] = {}
    if _POSITIONS in shapes and len(shapes[_POSITIONS]) == 3:
        found |= _transformer(shapes)
    layers = [shape for name, shape in sorted(shapes.items()) if name.startswith(_HEADS) and len(shape) == 2]
    if layers:
        layout = "vit" if len(layers) > 2 else "resnet"
        found |= {"heads": layout, "moco_dim": layers[-1][0], "moco_mlp_dim": layers[0][0]}
    return found


def backbone_shapes(state_dict: Mapping[str, Tensor]) -> Shapes:
    """Names and shapes of a MoCoV3.state_dict()'s backbone, apart from what depends on the image size."""
    shapes = _encoder(state_dict)
    return {name: shape for name, shape in shapes.items() if not name.startswith((*_HEADS, _POSITIONS))}


def nearest_architecture(state_dict: Mapping[str, Tensor], prefer: str) -> str:
    """The reference's architecture whose names and shapes are the most alike; `prefer` if none is more so."""
    known = [*VISION_TRANSFORMERS, *RESNETS]
    shapes = backbone_shapes(state_dict)

    def likeness(arch: str) -> int:
        theirs = _shapes(arch)
        return sum(theirs.get(name) == shape for name, shape in shapes.items()) - len(theirs.keys() ^ shapes.keys())

    return max(dict.fromkeys([prefer, *known] if prefer in known else known), key=likeness)


def _encoder(state_dict: Mapping[str, Tensor]) -> Shapes:
    return {name.removeprefix(_ENCODER): x.shape for name, x in state_dict.items() if name.startswith(_ENCODER)}


@functools.cache
def _shapes(arch: str) -> Shapes:
    with torch.device("meta"):
        module = build_backbone(arch).module
    return {name: value.shape for name, value in state_without_head(module).items() if name != _POSITIONS}


def _transformer(shapes: Shapes) -> dict[str, Any]:
    _, tokens, width = shapes[_POSITIONS]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    found: dict[str, Any] = {"embed_dim": width, "depth": len(blocks)}
    projection = shapes.get("patch_embed.proj.weight")
    patch = projection[-1] if projection is not None else 16  # a conv stem's
    side = round((tokens - 1) ** 0.5)
    return {**found, "image_size": side * patch} if side * side == tokens - 1 else found
