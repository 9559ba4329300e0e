"""State dicts and checkpoint files of the reference release (facebookresearch/moco-v3), both ways.

MoCoV3 uses the reference's parameter names, so that translation is a matter of the `module.` that DDP put before each.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PREFIX = "module."
_OWN = "a checkpoint of train_ddp.py"
_PARTS = ("base_encoder.", "momentum_encoder.", "predictor.")


class UnreadableFile(ValueError):
    """Not a file of PyTorch's, or a damaged one."""


class OwnCheckpoint(ValueError):
    """A checkpoint of train_ddp.py, which has a reader of its own."""


class OfficialCheckpoint(NamedTuple):
    """A pre-training file of the reference.

    epoch: epochs done. state_dict: as MoCoV3.load_state_dict takes it. optimizer, scaler: their state dicts, or None
    where the file has none, as the published ones. The optimizer's indices count MoCoV3.parameters() in order: see
    optimizer_from_official. num_heads: of a ViT's attention, which the weights do not tell; the reference does not
    write it, but `trainer.export` does for sizes that are not the reference's.
    """

    arch: str
    epoch: int
    state_dict: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any] | None
    num_heads: int | None = None


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

    Raises ValueError, saying what it is, for any other file: UnreadableFile where torch cannot tell, OwnCheckpoint for
    one of train_ddp.py. Raises OSError for one that cannot be opened.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler stumbles over rubbish with whatever error comes first
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(f"{os.fspath(file)}: not opened, as it holds code, {code[1]}") from error
        raise UnreadableFile(f"{os.fspath(file)}: not a PyTorch file of tensors and plain values") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        kind = _kind_of_content(content)
        refusal = OwnCheckpoint if kind == _OWN else ValueError
        raise refusal(f"{os.fspath(file)}: not a checkpoint of the MoCo v3 release but {kind}")
    try:
        state_dict = from_official(content["state_dict"])
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)}: {error}") from error
    absent = [key for key in ("arch", "epoch") if key not in content]
    if absent:
        raise ValueError(f"{os.fspath(file)}: a checkpoint without {' and '.join(absent)}")
    found = OfficialCheckpoint(
        content["arch"],
        content["epoch"],
        state_dict,
        content.get("optimizer"),
        content.get("scaler"),
        content.get("num_heads"),
    )
    damaged = _damaged(found)
    if damaged:
        raise ValueError(f"{os.fspath(file)}: its {damaged} is damaged")
    return found


def optimizer_to_official(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """State dict of an optimizer over the trained parameters of a MoCoV3, as the reference has it.

    That is one group of all parameters in order, those of the momentum encoder and frozen ones too, which have no
    state. Tensors are contiguous, as the reference's parameters are.
    """
    trained = _trained(model)
    (group,) = state["param_groups"]
    # Whether the update is one kernel is for the machine that goes on to choose, not part of the state.
    kept = {name: None if name in ("fused", "foreach") else value for name, value in group.items()}
    return {
        "state": {
            trained[place]: {key: value.contiguous() for key, value in entry.items()}
            for place, entry in state["state"].items()
        },
        "param_groups": [{**kept, "params": list(range(len(list(model.parameters()))))}],
    }


def optimizer_from_official(official: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The other way round: the state of the trained parameters, their group with indices that count these alone.

    A step count that is an int, as torch 1.9 wrote it, becomes the tensor that today's AdamW has. Each tensor gets the
    memory layout of its parameter: the fused AdamW takes that for granted, and adds up wrong elements otherwise.

    Raises ValueError if the file has state for other parameters than this model trains, or tensors of other shapes.
    """
    trained = _trained(model)
    (group,) = official["param_groups"]
    if sorted(official["state"]) != trained:
        names = dict(enumerate(name for name, _ in model.named_parameters()))
        odd = min(set(trained) ^ set(official["state"]))
        where = "here, not there" if odd in trained else "there, not here"
        raise ValueError(f"{names.get(odd, f'parameter {odd}')} is trained {where}")
    parameters = list(model.parameters())
    state = {}
    for place, index in enumerate(trained):
        parameter, entry = parameters[index], official["state"][index]
        if {value.shape for key, value in entry.items() if key != "step"} != {parameter.shape}:
            raise ValueError(f"its optimizer's state of parameter {index} is of another shape than the parameter")
        state[place] = {
            key: torch.tensor(float(value)) if key == "step" else _laid_out(value, parameter)
            for key, value in entry.items()
        }
    return {"state": state, "param_groups": [{**group, "params": list(range(len(trained)))}]}


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _trained(model: nn.Module) -> list[int]:
    return [place for place, parameter in enumerate(model.parameters()) if parameter.requires_grad]


def _damaged(found: OfficialCheckpoint) -> str | None:
    """Which part is not what the reference writes there; None if all are."""
    sound = {
        "arch": isinstance(found.arch, str),
        "epoch": isinstance(found.epoch, int) and found.epoch >= 0,
        "state_dict": all(isinstance(value, Tensor) for value in found.state_dict.values()),
        "optimizer state": found.optimizer is None or _is_optimizer(found.optimizer),
        "scaler": found.scaler is None or isinstance(found.scaler, dict),
        "num_heads": found.num_heads is None or isinstance(found.num_heads, int),
    }
    return next((part for part, whole in sound.items() if not whole), None)


def _is_optimizer(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    state, groups = content.get("state"), content.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list) or [type(group) for group in groups] != [dict]:
        return False
    entries = [entry for index, entry in state.items() if isinstance(index, int) and isinstance(entry, dict)]
    values = [(key, value) for entry in entries for key, value in entry.items()]
    kinds = ({"mu"}, {"step", "exp_avg", "exp_avg_sq"})  # LARS, AdamW
    return (
        len(entries) == len(state)
        and any(all(entry.keys() == kind for entry in entries) for kind in kinds)
        and all(isinstance(value, Tensor) or (key == "step" and isinstance(value, int)) for key, value in values)
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
    if {"format", "model", "loader"} <= content.keys():
        return _OWN
    return f"a dict of {', '.join(str(key) for key in list(content)[:3]) or 'nothing'}"
