"""What `--resume` names: a checkpoint of train_ddp.py, or one of the reference release, whose run goes on here."""

from pathlib import Path
from typing import Any

from model import MoCoV3
from model.identity import backbone_shapes, nearest_architecture, settings
from model.official import OfficialCheckpoint, OwnCheckpoint, UnreadableFile, load_official, optimizer_from_official
from model.vision_transformer import VISION_TRANSFORMERS
from trainer import checkpoint
from trainer.config import Config, ConfigError, disagreement, disagreements
from trainer.engine import Engine


def check(file: Path, config: Config, fingerprint: str, model: MoCoV3) -> tuple[list[str], bool]:
    """Find out whether a run can start from `file`; `model` is one that the configuration builds.

    Returns:
        Remarks for the user, a line each; and whether it binds the run to all of its flags, the batch size too.

    Raises:
        ConfigError: it is no checkpoint, or one of another model, recipe or dataset; or a file of the reference whose
            run is complete.
    """
    found = _read(file)
    if isinstance(found, OfficialCheckpoint):
        return _check_official(file, found, config, model), False
    differ = disagreements(found["flags"], config.flags())
    if found["fingerprint"] != fingerprint:
        differ.append("the images are others")
    if differ:
        raise ConfigError(f"--resume {file} is from another run: {'; '.join(differ)}")
    return [], True


def start(file: Path, engine: Engine) -> dict[str, Any]:
    """What `Engine.load_state_dict` takes, from a file that passed `check`.

    The reference saves at the end of an epoch and does not say how many steps that had: ours go on at the start of the
    next one, with the learning rate and the momentum coefficient of that epoch. What the file lacks, optimizer or
    loss scale, stays as fresh as the engine has it.
    """
    found = _read(file)
    if not isinstance(found, OfficialCheckpoint):
        return found
    state = engine.state_dict()
    if found.optimizer is not None:
        theirs = optimizer_from_official(found.optimizer, engine.model)
        # The settings are this command's, which agree with the file's where it has them.
        state["optimizer"] = {"state": theirs["state"], "param_groups": state["optimizer"]["param_groups"]}
    return {
        **state,
        "step": found.epoch * engine.steps_per_epoch,
        "model": found.state_dict,
        "scaler": found.scaler or state["scaler"],
        "loader": {**state["loader"], "epoch": found.epoch, "step": 0},
    }


def _read(file: Path) -> dict[str, Any] | OfficialCheckpoint:
    if file.is_dir():
        raise ConfigError(f"--resume {file} is a folder; name a checkpoint in it, or go on with the same --out")
    try:
        return checkpoint.load(file)
    except ConfigError as error:
        refusal = error
    try:
        return load_official(file)
    except (OSError, OwnCheckpoint, UnreadableFile):
        raise refusal from None
    except ValueError as error:
        raise ConfigError(f"--resume {error}") from None


def _check_official(file: Path, found: OfficialCheckpoint, config: Config, model: MoCoV3) -> list[str]:
    source = f"--resume {file}, epoch {found.epoch} of a {found.arch} of the reference release,"
    differ = _model_differences(found, config, model)
    if differ:
        raise ConfigError(f"{source} is another model: {'; '.join(differ)}")
    differ = _optimizer_differences(found, config)
    if differ:
        raise ConfigError(f"{source} was trained otherwise: {'; '.join(differ)}")
    if found.optimizer is not None:
        try:
            optimizer_from_official(found.optimizer, model)
        except ValueError as error:
            raise ConfigError(f"{source} is another model: {error}; see --stop-grad-conv1") from None
    if found.epoch >= config.optim.epochs:
        raise ConfigError(f"{source} has all of --epochs {config.optim.epochs} behind it; nothing is left to train")
    absent = [name for name, part in (("optimizer", found.optimizer), ("scaler", found.scaler)) if part is None]
    if config.run.amp != "fp16" and "scaler" in absent:
        absent.remove("scaler")
    remarks = [f"going on from {file}: {found.arch} of the reference release after {found.epoch} epochs"]
    if absent:
        remarks.append(f"it has no {' and no '.join(absent)} state: that starts afresh")
    return remarks


def _model_differences(found: OfficialCheckpoint, config: Config, model: MoCoV3) -> list[str]:
    ours, arch = model.state_dict(), config.model.arch
    fits = {name: value.shape for name, value in found.state_dict.items()} == {
        name: value.shape for name, value in ours.items()
    }
    if fits:
        return _heads_differences(found, config)
    if backbone_shapes(found.state_dict) != backbone_shapes(ours):
        nearest = nearest_architecture(found.state_dict, prefer=arch)
        if nearest != arch:
            return [disagreement("arch", nearest, arch)]
    there, here = settings(found.state_dict), settings(ours)
    differ = [disagreement(name, there[name], here.get(name)) for name in there if there[name] != here.get(name)]
    odd = sorted(found.state_dict.keys() ^ ours.keys())
    return differ or [f"{odd[0]} is in one of them only" if odd else "a tensor has another shape"]


def _heads_differences(found: OfficialCheckpoint, config: Config) -> list[str]:
    """Weights fit any number of attention heads, and give nonsense with another one than they were trained with."""
    own = VISION_TRANSFORMERS.get(config.model.arch)
    if own is None:
        return []
    here, there = config.model.num_heads or own["num_heads"], found.num_heads
    if there is None and (config.model.embed_dim or own["embed_dim"]) == own["embed_dim"]:
        there = own["num_heads"]
    return [disagreement("num_heads", there, here)] if there not in (None, here) else []


def _optimizer_differences(found: OfficialCheckpoint, config: Config) -> list[str]:
    if found.optimizer is None:
        return []
    keys = {key for entry in found.optimizer["state"].values() for key in entry}
    (group,) = found.optimizer["param_groups"]
    kind = "lars" if keys == {"mu"} else "adamw"
    if kind != config.optim.optimizer:
        return [disagreement("optimizer", kind, config.optim.optimizer)]
    here = {"weight_decay": config.optim.weight_decay}
    if kind == "lars":
        here["momentum"] = config.optim.momentum
    return [disagreement(name, group.get(name), value) for name, value in here.items() if group.get(name) != value]
