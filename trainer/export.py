"""Weight files of a run for other programs: `python -m trainer.export --run RUN --out FILE --format FORMAT`.

timm: a plain safetensors file that timm's or torchvision's own model loads strictly. official: the reference's
checkpoint, with optimizer. deit: {"model": weights}, as DeiT's fine-tuning takes it. Beside each lies FILE.json: how to
build the model, and what it expects of its images.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from safetensors.torch import save
from torch import nn

from dali_pipes.replacing import replacing, write_atomically
from model import MoCoV3
from model.backbones import RESNETS
from model.moco import IMAGENET_MEAN, IMAGENET_STD
from model.official import optimizer_to_official, to_official
from model.vision_transformer import VISION_TRANSFORMERS
from trainer import checkpoint
from trainer import config as configuration
from trainer.config import Config, ConfigError
from trainer.engine import build_model
from trainer.eval_reader import CROP, RESIZE
from trainer.run_folder import CONFIG

Format = Literal["timm", "official", "deit"]


@dataclass(frozen=True)
class Export:
    """Turn a run's newest whole checkpoint into a weight file, with FILE.json beside it that says how to load it."""

    run: Path
    """Folder of the run."""
    out: Path
    """File to write; one that is there is never overwritten."""
    format: Format = "timm"
    """timm: backbone as safetensors, for timm or torchvision. official: whole checkpoint of the reference release.
    deit: backbone for DeiT's fine-tuning."""


@dataclass(frozen=True)
class TrainedRun:
    """A run as its newest whole checkpoint has it: `model` on the CPU, its batch norms not synchronised."""

    folder: Path
    file: Path  # the checkpoint
    config: Config
    model: MoCoV3
    state: dict[str, Any]  # the checkpoint, see Engine.state_dict
    warnings: list[str]  # newer checkpoints that are damaged

    @property
    def step(self) -> int:
        """Training steps done."""
        return self.state["step"]

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.state["loader"]["epoch"]


def open_run(folder: Path, file: Path | None = None) -> TrainedRun:
    """Read a run, from `file` if it is given; nothing in its folder changes, and it may still be training.

    Raises:
        ConfigError: there is no run, or it has no whole checkpoint.
    """
    if not folder.is_dir():
        wrong = "is a file; name the run's folder" if folder.exists() else "no such folder"
        raise ConfigError(f"--run {folder}: {wrong}")
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"--run {folder} holds no run of train_ddp.py: it has no {CONFIG}")
    warnings: list[str] = []
    try:
        if file is None:
            file, state, warnings = checkpoint.newest_state(folder)
        else:
            state = checkpoint.load(file)
    except ConfigError as error:
        raise ConfigError(f"--run {folder}: {str(error).removesuffix('. Name another --out')}") from None
    if file is None or state is None:
        raise ConfigError(f"--run {folder} has no checkpoint yet; train it first")
    try:
        config = configuration.replace(Config(), **state["flags"])
        model = build_model(config, sync_bn=False).to(getattr(torch, config.run.dtype))
        model.load_state_dict(state["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--run {folder}: {file.name} does not fit what is installed here: {reason}") from None
    return TrainedRun(folder, file, config, model, state, warnings)


def export(run: TrainedRun, out: Path, form: Format) -> dict[str, Any]:
    """Write `out` and `out`.json; returns what the JSON says.

    Raises:
        ConfigError: one of the two is there already, or cannot be written, or the format does not know the backbone.
    """
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file")
    beside = out.with_name(out.name + ".json")
    for file in (out, beside):
        if file.exists():
            raise ConfigError(f"--out {file} is there already; name another file or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    arch = run.config.model.arch
    if form == "official" and arch not in (*VISION_TRANSFORMERS, *RESNETS):
        raise ConfigError(f"--format official: the reference has no {arch}; use --format timm or --format deit")

    about = description(run, form, out.name)
    # Each one by itself: safetensors refuses what shares memory, as some of timm's models do.
    found = run.model.backbone_state_dict().items()
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in found}
    try:
        with replacing(out) as stream:
            if form == "timm":
                stream.write(save(weights, {"format": "pt"}))
            else:
                torch.save({"model": weights} if form == "deit" else official_checkpoint(run), stream)
        write_atomically(beside, (json.dumps(about, indent=2) + "\n").encode())
    except OSError as error:
        out.unlink(missing_ok=True)  # nothing was there, and without the other file it does not say how to load it
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    return about


def official_checkpoint(run: TrainedRun) -> dict[str, Any]:
    """What the reference saves after an epoch, optimizer and loss scaler included.

    Its `--resume` goes on at the start of an epoch; steps of one that was under way are in the weights all the same.
    """
    # A disabled scaler has an empty state, which the reference's scaler, never disabled, refuses to load.
    scaler = run.state["scaler"] or torch.amp.GradScaler("cpu").state_dict()
    arch, heads = run.config.model.arch, {}
    if arch in VISION_TRANSFORMERS and run.config.model.backbone:  # a key of ours, which the reference does not look at
        heads["num_heads"] = _attention_heads(run.model.base_encoder)
    return {
        "epoch": run.epoch,
        "arch": arch,
        **heads,
        "state_dict": to_official(run.model.state_dict()),
        "optimizer": optimizer_to_official(run.state["optimizer"], run.model),
        "scaler": scaler,
    }


def description(run: TrainedRun, form: str, file: str) -> dict[str, Any]:
    """What a reader of `file` has to know: the call that builds its model, and which images it expects."""
    arch = run.config.model.arch
    builder = _builder(run)
    about: dict[str, Any] = {
        "format": form,
        "arch": arch,
        "constructor": builder.constructor,
        "arguments": builder.arguments,
        "load": loading(run, form, file),
        "heads": _attention_heads(run.model.base_encoder),
        "features": run.model.feature_dim,
        "image_size": run.config.data.image_size,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "run": str(run.folder.absolute()),
        "step": run.step,
        "epochs": run.epoch,
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
    notes = []
    if form == "official" and not _has_reference_sizes(run):
        notes.append(f"the reference's {arch} has other sizes or heads, and its code cannot load this file")
    if "vit_conv" in arch:
        notes.append("timm has no such conv stem: load it with a checkout of this repository on PYTHONPATH")
    if form == "official" and (step := run.state["loader"]["step"]):
        notes.append(
            f"saved within epoch {run.epoch}: a run that goes on from it takes the epoch's first {step} steps again"
        )
    if notes:
        about["note"] = "; ".join(notes)
    return about


def loading(run: TrainedRun, form: str, file: str) -> list[str]:
    """Lines of Python that leave the backbone with the weights of `file` in `model`."""
    return _builder(run).code() + _reading(form, file, "fc" if run.config.model.arch in RESNETS else "head")


@dataclass(frozen=True)
class Builder:
    """The call that builds a backbone outside of this repository, or, for conv stems, with its module."""

    constructor: str
    arguments: dict[str, Any]
    classifier: str | None = None  # to be taken off, where the constructor cannot leave it out

    def code(self) -> list[str]:
        """Lines of Python that leave the backbone in `model`."""
        module, _, name = self.constructor.rpartition(".")
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        lines = [f"from {module} import {name}", f"model = {name}({arguments})"]
        return [*lines, "import torch", f"model.{self.classifier} = torch.nn.Identity()"] if self.classifier else lines


def _builder(run: TrainedRun) -> Builder:
    arch, size = run.config.model.arch, run.config.data.image_size
    if arch in RESNETS:
        return Builder(f"torchvision.models.{arch}", {}, classifier="fc")
    if arch not in VISION_TRANSFORMERS:
        pretrained = timm.get_pretrained_cfg(arch)
        sized = {"img_size": size} if pretrained is not None and pretrained.fixed_input_size else {}
        return _by_timm(arch, size, {**sized, **run.config.model.backbone})
    vit: Any = run.model.base_encoder
    sizes = {"embed_dim": vit.embed_dim, "depth": len(vit.blocks), "num_heads": _attention_heads(vit)}
    if "conv" in arch:
        return Builder("model.vision_transformer.vision_transformer", {"arch": arch, "image_size": size, **sizes})
    # Said in full, as timm's vit_small has 6 heads, with which these weights load as well and give wrong features.
    return _by_timm(f"{arch}_patch16_224", size, {"img_size": size, **sizes})


def _by_timm(name: str, size: int, arguments: dict[str, Any]) -> Builder:
    """Also tells timm's `resolve_model_data_config` our normalisation and our crop in evaluation: timm's own entry has
    other means for ViTs.
    """
    images = {"input_size": (3, size, size), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    overlay = {**images, "interpolation": "bilinear", "crop_pct": CROP / RESIZE, "crop_mode": "center"}
    model = {"model_name": name, "num_classes": 0, "pretrained_cfg_overlay": overlay}
    return Builder("timm.create_model", {**model, **arguments})


def _reading(form: str, file: str, head: str) -> list[str]:
    if form == "timm":
        return ["from safetensors.torch import load_file", f"model.load_state_dict(load_file({file!r}))"]
    if form == "deit":
        return ["import torch", f"model.load_state_dict(torch.load({file!r}, weights_only=True)['model'])"]
    return [
        "import torch",
        f"state = torch.load({file!r}, weights_only=True)['state_dict']",
        "start = 'module.base_encoder.'",
        "state = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}",
        f"model.load_state_dict({{k: v for k, v in state.items() if not k.startswith('{head}.')}})",
    ]


def _attention_heads(module: nn.Module) -> int | list[int] | None:
    """Attention heads of every block: one number if all agree; None where there is no attention."""
    found = (getattr(part, "num_heads", None) for part in module.modules())
    heads = [number for number in found if isinstance(number, int)]
    return heads[0] if len(set(heads)) == 1 else heads or None


def _has_reference_sizes(run: TrainedRun) -> bool:
    config = run.config
    if (sizes := VISION_TRANSFORMERS.get(config.model.arch)) is None:
        return run.model.heads == "resnet"
    same = {**sizes, **config.model.backbone} == sizes and config.data.image_size == 224
    return same and run.model.heads == "vit"


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code: 0 written, 2 wrong use."""
    command = tyro.cli(Export, prog="python -m trainer.export", args=list(argv))
    try:
        run = open_run(command.run)
        for warning in run.warnings:
            print(f"warning: {warning}; taking the one before")
        about = export(run, command.out, command.format)
    except (ConfigError, OSError) as error:
        print(f"trainer.export: error: {error}", file=sys.stderr)
        return 2
    after = f"{about['step']} steps ({about['epochs']} epochs)"
    print(f"{command.out}: {about['arch']} after {after}, {command.format} format; it loads by")
    print("\n".join(f"  {line}" for line in loading(run, command.format, str(command.out))))
    if "note" in about:
        print(f"note: {about['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
