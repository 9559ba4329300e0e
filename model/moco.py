"""MoCo v3: two encoders, a predictor, momentum update, symmetric contrastive loss (paper, section 3, algorithm 1)."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.backbones import (
    Backbone,
    ImageSize,
    build_backbone,
    features,
    freeze_patch_projection,
    head,
    state_without_head,
)
from model.collectives import start_gather
from model.contrastive import contrastive_loss
from model.heads import Layout, predictor, projector
from model.sync_bn import convert

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pair = tuple[Tensor, Tensor]


class MoCoV3(nn.Module):
    """The model that is trained. Images x are (N, 3, H, W): float, normalised; or uint8 RGB, normalised inside.

    State-dict names are the reference release's: base_encoder.*, momentum_encoder.*, predictor.*.
    """

    def __init__(
        self, backbone: Backbone, projector: nn.Module, predictor: nn.Module, temperature: float, heads: Layout
    ) -> None:
        """The backbone gets the projector for a head; the momentum encoder starts as a copy of the two.

        heads: the layout of projector and predictor, kept as an attribute.
        """
        super().__init__()
        # To a batch norm each view is a batch of its own (paper, appendix A); else one pass for both gives the same.
        self.one_pass = not any(isinstance(part, _BatchNorm) for part in backbone.module.modules())
        self.base_encoder = backbone.with_head(projector)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor = predictor
        self.normalize = Normalize()
        self.feature_dim, self.family, self.heads = backbone.feature_dim, backbone.family, heads
        self.temperature = temperature
        self._backbone: Callable[..., Tensor] = _features

    @classmethod
    def build(
        cls,
        arch: str,
        dim: int = 256,
        mlp_dim: int = 4096,
        temperature: float = 0.2,
        stop_grad_conv1: bool = True,
        image_size: ImageSize = 224,
        sync_bn: bool = False,
        heads: Literal["auto", "vit", "resnet"] = "auto",
        backbone: Mapping[str, Any] | None = None,
    ) -> Self:
        """A model with fresh weights.

        arch, image_size, backbone: see build_backbone. dim, mlp_dim: width of embeddings and of the hidden layers of
        both heads. stop_grad_conv1: freeze a transformer's patch projection at its random start (paper, section 4.1);
        other stems have none and are left alone. sync_bn: batch statistics over all ranks. heads: layout of projector
        and predictor, by default that of the backbone's family.
        """
        network = build_backbone(arch, image_size, backbone)
        layout = network.family if heads == "auto" else heads
        model = cls(
            network,
            projector(network.feature_dim, mlp_dim, dim, layout),
            predictor(mlp_dim, dim, layout),
            temperature,
            layout,
        )
        if stop_grad_conv1:
            freeze_patch_projection(model.base_encoder)
        if sync_bn:
            convert(model)
        return model

    def forward(self, x1: Tensor, x2: Tensor, momentum: float) -> Tensor:
        """Loss of two views of the same images; moves the momentum encoder on the way."""
        self.update_momentum(momentum)
        k = self.keys(x1, x2)
        under_way = self.start_gather(k)  # ends beside the queries, which need no keys
        return self.loss(self.queries(x1, x2), k, under_way)

    def queries(self, x1: Tensor, x2: Tensor) -> Pair:
        """Predictions (N, dim) for each view, with gradient: encode, then predict."""
        return self.predict(self.encode(x1, x2))

    def encode(self, x1: Tensor, x2: Tensor) -> Pair:
        """Backbone features (N, feature_dim) of each view, with gradient."""
        return self._both(self.base_encoder, x1, x2)

    def _both(self, encoder: nn.Module, x1: Tensor, x2: Tensor) -> Pair:
        if self.one_pass:
            first, second = self._backbone(encoder, self.normalize, x1, x2).chunk(2)
            return first, second
        return self._backbone(encoder, self.normalize, x1), self._backbone(encoder, self.normalize, x2)

    def encode_view(self, x: Tensor) -> Tensor:
        """Backbone features (N, feature_dim) of one view, with gradient."""
        return self._backbone(self.base_encoder, self.normalize, x)

    def predict(self, f: Pair) -> Pair:
        """Predictions (N, dim) from the backbone features of each view: projector, then predictor."""
        project = head(self.base_encoder)
        return self.predictor(project(f[0])), self.predictor(project(f[1]))

    @torch.no_grad()
    def keys(self, x1: Tensor, x2: Tensor) -> Pair:
        """Embeddings (N, dim) of each view by the momentum encoder, without gradient.

        In training mode with batch statistics, as for queries; running statistics are the momentum encoder's own.
        """
        return self.project_keys(self._both(self.momentum_encoder, x1, x2))

    @torch.no_grad()
    def encode_key_view(self, x: Tensor) -> Tensor:
        """The momentum encoder's backbone features (N, feature_dim) of one view, without gradient."""
        return self._backbone(self.momentum_encoder, self.normalize, x)

    @torch.no_grad()
    def project_keys(self, f: Pair) -> Pair:
        """Embeddings (N, dim) from the momentum encoder's features of each view, without gradient."""
        project = head(self.momentum_encoder)
        return project(f[0]), project(f[1])

    def start_gather(self, k: Pair) -> Pair:
        """Have the ranks exchange these keys while something else is computed; for `loss`."""
        return start_gather(k[0]), start_gather(k[1])

    @torch.no_grad()
    def update_momentum(self, m: float) -> None:
        """momentum encoder <- m x momentum encoder + (1 - m) x base encoder; parameters only, not buffers."""
        # As an interpolation, equal tensors stay equal to the last bit (position embedding, frozen patch projection).
        torch._foreach_lerp_(
            list(self.momentum_encoder.parameters()), list(self.base_encoder.parameters()), weight=1 - m
        )

    def loss(self, q: Pair, k: Pair, under_way: Pair | tuple[None, None] = (None, None)) -> Tensor:
        """Symmetric contrastive_loss, a scalar; chance level is 4 x temperature x ln(global batch).

        under_way: the `start_gather` of k, if that was done before.
        """
        first = contrastive_loss(q[0], k[1], self.temperature, under_way[1])
        return first + contrastive_loss(q[1], k[0], self.temperature, under_way[0])

    def features(self, x: Tensor) -> Tensor:
        """Backbone features (N, feature_dim) of the base encoder, without projector, in the module's present mode."""
        # Never the compiled form: each of evaluation's batch sizes would be compiled anew.
        return _features(self.base_encoder, self.normalize, x)

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """State of the base encoder without projector, under the names of timm's or torchvision's model."""
        return state_without_head(self.base_encoder)

    def compile_parts(self, **options: Any) -> None:
        """torch.compile what computes, a graph each: backbones with the normalisation before them, heads, predictor.

        options: of torch.compile. The methods that compose the parts stay Python.
        """
        options = {"fullgraph": True, "dynamic": False, **options}
        self._backbone = torch.compile(_features, **options)
        for part in (head(self.base_encoder), head(self.momentum_encoder), self.predictor):
            part.compile(**options)


def _features(encoder: nn.Module, normalize: nn.Module, *views: Tensor) -> Tensor:
    return features(encoder, normalize(torch.cat(views) if len(views) > 1 else views[0]))


class Normalize(nn.Module):
    """uint8 RGB (N, 3, H, W) to (x / 255 - mean) / std of ImageNet, in the module's dtype; float passes unchanged."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        # Buffers, so that they are on the device before the first step; not persistent, so that checkpoints keep their
        # keys.
        self.register_buffer("scale", (1 / (255 * std)).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("shift", (-mean / std).to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, in the memory format of x."""
        if x.dtype != torch.uint8:
            return x
        return torch.addcmul(self.shift, x.to(self.scale.dtype), self.scale)
