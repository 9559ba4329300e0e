"""State dicts and checkpoint files of the reference release (facebookresearch/moco-v3), both ways.

MoCoV3 uses the reference's parameter names, so that translation is a matter of the `module.` that DDP put before each.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PREFIX = "module."
_PARTS = ("base_encoder.", "momentum_encoder.", "predictor.")


class OfficialCheckpoint(NamedTuple):
    """A pre-training file of the reference.

    epoch: epochs done. state_dict: as MoCoV3.load_state_dict takes it. optimizer, scaler: their state dicts, or None
    where the file has none, as the published ones. The optimizer's indices count MoCoV3.parameters() in order.
    """

    arch: str
    epoch: int
    state_dict: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any] | None


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's full state dict, with or without `module.`, under MoCoV3's names.

    Raises ValueError, saying what it is, for anything but a whole pre-training model: base encoder, momentum encoder
    and predictor.
    """
    ours = {name.removeprefix(_PREFIX): value for name, value in state_dict.items()}
    foreign = [name for name in ours if not name.startswith(_PARTS)]
    missing = [part for part in _PARTS if not any(name.startswith(part) for name in ours)]
    if foreign or missing:
        raise ValueError(f"not the weights of a MoCo v3 pre-training but {_kind_of_weights(ours, foreign, missing)}")
    return ours


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MoCoV3.state_dict() under the reference's names; raises ValueError as from_official does."""
    return {_PREFIX + name: value for name, value in from_official(state_dict).items()}


def load_official(file: str | os.PathLike[str]) -> OfficialCheckpoint:
    """Reads a pre-training file (`checkpoint_0299.pth.tar`, `vit-s-300ep.pth.tar`) to the CPU, executing no code in it.

    Raises ValueError, saying what it is, for any other file, and OSError for one that cannot be opened.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler stumbles over rubbish with whatever error comes first
        raise ValueError(f"{os.fspath(file)}: not a PyTorch file of tensors and plain values") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{os.fspath(file)}: not a checkpoint of the MoCo v3 release but {_kind_of_content(content)}")
    try:
        state_dict = from_official(content["state_dict"])
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)}: {error}") from error
    absent = [key for key in ("arch", "epoch") if key not in content]
    if absent:
        raise ValueError(f"{os.fspath(file)}: a checkpoint without {' and '.join(absent)}")
    return OfficialCheckpoint(
        content["arch"], content["epoch"], state_dict, content.get("optimizer"), content.get("scaler")
    )


def _kind_of_weights(names: Mapping[str, Tensor], foreign: list[str], missing: list[str]) -> str:
    if "head.weight" in names or "fc.weight" in names:
        return "those of a classifier, as a linear probe saves them"
    if foreign:
        return f"with the foreign name {foreign[0]}"
    return f"without {' and '.join(part.rstrip('.') for part in missing)}"


def _kind_of_content(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if set(content) == {"model"}:
        return "a backbone in DeiT's format"
    return f"a dict of {', '.join(str(key) for key in list(content)[:3]) or 'nothing'}"
