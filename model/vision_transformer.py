"""The vision transformers of MoCo v3: timm's VisionTransformer, fixed position embedding, an initialisation of its own.

Paper, section 4 and appendix A; names and sizes as in the reference release.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# vit_small has 12 heads of 32 channels, where DeiT-S and timm have 6 of 64: weights load into the other without an
# error and give wrong features. A conv stem stands in for one of the 12 blocks.
VISION_TRANSFORMERS = {
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 12},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_conv_small": {"embed_dim": 384, "depth": 11, "num_heads": 12},
    "vit_conv_base": {"embed_dim": 768, "depth": 11, "num_heads": 12},
}


def vision_transformer(arch: str, image_size: int | tuple[int, int] = 224, **overrides: Any) -> VisionTransformer:
    """One of VISION_TRANSFORMERS, no classifier; features are the class token after the last norm.

    image_size: side, or (height, width), in pixels; overrides: arguments of timm's VisionTransformer. Raises ValueError
    for a size that the patch does not divide, and for widths that neither position embedding nor stem can divide.
    """
    kwargs: dict[str, Any] = {"patch_size": 16, **VISION_TRANSFORMERS[arch], **overrides}
    check_divisible(arch, image_size, kwargs["patch_size"])
    if "conv" in arch:
        kwargs["embed_layer"] = ConvStem
    vit = VisionTransformer(img_size=image_size, num_classes=0, weight_init="skip", **kwargs)
    table = sincos_position_embedding(vit.embed_dim, *vit.patch_embed.grid_size)
    vit.pos_embed = nn.Parameter(table, requires_grad=False)
    _initialize(vit)
    return vit


def check_divisible(arch: str, image_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """ValueError unless whole patches fill the image; it names the two nearest sizes that would do."""
    for size, patch in zip(as_pair(image_size), as_pair(patch_size), strict=True):
        if size % patch or not size:
            below = max(size // patch, 1) * patch
            raise ValueError(
                f"--image-size {image_size} is not divisible by the patch size {patch} of {arch}; "
                f"use {below} or {below + patch}"
            )


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sincos_position_embedding(width: int, rows: int, columns: int) -> Tensor:
    """The fixed 2-D sine-cosine position embedding (paper, appendix A): (1, 1 + rows x columns, width), float32.

    The class token has zeros. A patch has four blocks of width / 4: sine and cosine of its row, then of its column,
    times the frequencies 10000^(-i / (width / 4)). Patches are row-major. (For grids that are not square the reference
    release mixes rows and columns up; here they are right.) Raises ValueError if width is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"embed_dim {width} is not divisible by 4, as the position embedding needs")
    # In float32 from the start, as in the reference: the last bits of the table are part of its published weights.
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    row = torch.arange(rows, dtype=torch.float32).repeat_interleave(columns)[:, None] * frequencies
    column = torch.arange(columns, dtype=torch.float32).repeat(rows)[:, None] * frequencies
    patches = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), patches])[None]


class ConvStem(nn.Module):
    """Four strided 3x3 convolutions and a 1x1 in place of the patch projection (Xiao et al., arXiv 2106.14881).

    (N, 3, H, W) to (N, H/16 x W/16, embed_dim). Takes the arguments that timm's VisionTransformer gives its
    embed_layer. Raises ValueError for a patch size other than 16 and for a width that is not divisible by 8.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        **_: Any,
    ) -> None:
        super().__init__()
        if as_pair(patch_size) != (16, 16):
            raise ValueError(f"patch_size {patch_size}: a conv stem has patches of 16")
        if embed_dim % 8:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by 8, as the conv stem needs")
        self.img_size = as_pair(img_size)
        height, width = self.img_size
        self.grid_size = (height // 16, width // 16)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [
                nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        layers.append(nn.Conv2d(embed_dim, embed_dim, kernel_size=1))
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images to tokens; raises ValueError for another size than the position embedding was made for."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"images of height and width {tuple(x.shape[-2:])}; the conv stem takes {self.img_size}")
        return self.proj(x).flatten(2).transpose(1, 2)


def _initialize(vit: VisionTransformer) -> None:
    for name, part in vit.named_modules():
        if isinstance(part, nn.Linear):
            # qkv is three square projections in one tensor, each with its own Xavier bound.
            outputs = part.out_features // 3 if name.endswith("qkv") else part.out_features
            _uniform(part.weight, fan_in=part.in_features, fan_out=outputs)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    projection = vit.patch_embed.proj
    # A conv stem keeps PyTorch's default.
    if isinstance(projection, nn.Conv2d) and projection.bias is not None:
        # One patch as the fan in, one token as the fan out: the law of the Linear that the projection is.
        _uniform(projection.weight, fan_in=projection.weight[0].numel(), fan_out=vit.embed_dim)
        nn.init.zeros_(projection.bias)


def _uniform(weight: Tensor, fan_in: int, fan_out: int) -> None:
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
