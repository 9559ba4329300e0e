"""An experiment: the linear layers of a transformer's blocks in float8, by torchao. train_ddp.py has no such flag yet.

Scaled per tensor at each use: activations and weights as e4m3, gradients as e5m2 (Micikevicius et al. 2022). Patch
projection, heads and logits stay as they are. Without a GPU that can multiply float8, torchao rounds to float8 and
multiplies in float32: the rounding is that of float8; the time is not, nor the sums of the forward pass, which such a
GPU keeps in fewer bits.
"""

import torch
from torch import nn

from model import MoCoV3
from trainer.config import ConfigError

_MULTIPLE = 16  # of which both sides of a weight must be one, to cuBLAS
_CAPABILITY = (8, 9)  # of the first GPUs that multiply float8


def multiplies_float8(device: torch.device) -> bool:
    """Whether the device does so, or torchao only acts as if."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def float8_blocks(model: MoCoV3, device: torch.device) -> MoCoV3:
    """Have both encoders compute their blocks' linear layers in float8; the model itself is changed and returned.

    To be called before the model is compiled; names and values of its parameters stay.

    Raises:
        ConfigError: there is no torchao that fits this torch, or the backbone has no such layers.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(f"float8 needs a torchao that fits this torch ({error}): pip install torchao") from None

    def converted(layer: nn.Module, name: str) -> bool:
        if not isinstance(layer, nn.Linear) or not name.startswith("blocks."):
            return False
        return layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0

    if not any(converted(layer, name) for name, layer in model.base_encoder.named_modules()):
        raise ConfigError("this backbone has no blocks with linear layers to compute in float8; use a transformer")
    # Padded: batch x tokens is a side of the weights' gradient, and need be no multiple.
    config = Float8LinearConfig(emulate=not multiplies_float8(device), pad_inner_dim=True)
    for encoder in (model.base_encoder, model.momentum_encoder):
        convert_to_float8_training(encoder, module_filter_fn=converted, config=config)
    return model
