"""Golden cases, rebuilt with our own model in float64."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import MoCoV3
from tests.golden import formula

_SMALL = ("custom_vit", "resnet18")
Case = dict[str, Any]


@functools.cache
def load(name: str) -> Any:
    """The data of tests/golden/NAME.json."""
    return _file(name)["data"]


def salt() -> str:
    return str(_file("units")["salt"])


def params(name: str) -> list[Any]:
    """The cases of a file as pytest parameters; what takes long is marked slow."""
    return [
        pytest.param(
            golden, id=golden["case"]["tag"], marks=[] if golden["case"]["arch"] in _SMALL else pytest.mark.slow
        )
        for golden in load(name)
    ]


def build(case: Case, **options: Any) -> MoCoV3:
    """The case's model with formula weights, in float64, channels_last and training mode."""
    arch, overrides = case["arch"], {}
    if arch == "custom_vit":
        arch = "vit_conv_small" if case.get("conv_stem") else "vit_small"
        overrides = {key: case[key] for key in ("embed_dim", "depth", "num_heads")}
    model = MoCoV3.build(
        arch,
        dim=case.get("dim", 256),
        mlp_dim=case.get("mlp_dim", 4096),
        temperature=case.get("T", 1.0),
        stop_grad_conv1=case.get("stop_grad_conv1", False),
        image_size=case["img"],
        backbone=overrides,
        **options,
    )
    with torch.no_grad():
        for name, value in model.state_dict().items():
            filled = formula.weight(salt(), name, tuple(value.shape))
            if filled is not None:
                value.copy_(torch.from_numpy(filled))
        if case.get("momentum_init") == "copy":
            for key, query in zip(model.momentum_encoder.parameters(), model.base_encoder.parameters(), strict=True):
                key.copy_(query)
    return model.double().to(memory_format=torch.channels_last)


def views(case: Case, suffix: str = "", n: int | None = None) -> tuple[Tensor, Tensor]:
    tag = case["tag"] + suffix
    first, second = (formula.images(salt(), tag, n or case["n"], case["img"], view) for view in (1, 2))
    return first, second


def batch_norm_digests(model: nn.Module, names: Any) -> dict[str, Any]:
    """Running statistics of the batch norms called `names` (with the golden's trailing dot)."""
    buffers = dict(model.named_buffers())
    return {
        name: {
            "running_mean": formula.digest(buffers[name + "running_mean"]),
            "running_var": formula.digest(buffers[name + "running_var"]),
            "num_batches_tracked": int(buffers[name + "num_batches_tracked"]),
        }
        for name in names
    }


def digests(tensors: Mapping[str, Tensor], names: Any) -> dict[str, Any]:
    return {name: formula.digest(tensors[name]) for name in names}


def global_norm(tensors: Any) -> float:
    return float(torch.stack([tensor.detach().norm() for tensor in tensors]).norm())


def group_norms(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Norms by stage: of cls_token, of each block or layer, of the head, of the predictor."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        parts = name.removeprefix("base_encoder.").split(".")
        group = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        groups.setdefault(group, []).append(gradient)
    return {group: global_norm(members) for group, members in groups.items()}


@functools.cache
def _file(name: str) -> Any:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())
