"""What a run is: frozen dataclasses, one per concern, that tyro turns into one flat set of flags."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


class ConfigError(ValueError):
    """A wrong flag or environment: one line that says what, which value, and how to mend it."""


_INTERVAL = r"0*[1-9]\d{0,9}|(?=.*[1-9])\d{1,6}(\.\d{1,6})?min"  # steps or minutes, above 0


@dataclass(frozen=True)
class Data:
    """Images and views."""

    data: Path = tyro.MISSING
    """Folder of images: holds train/ and optionally val/, as ImageNet does, or is itself the training tree.
    Or a list file."""
    image_size: int = 224
    """Side of the square views, in pixels."""
    crop_min: float = 0.08
    """Lower bound of the crop's share of the image area, both views."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """DALI threads a rank; None: the machine's or container's cores shared among its ranks, at most 16."""
    augment: Literal["auto", "fused", "dali"] = "auto"
    """Who augments after the crop: DALI's operators, or fused kernels on CUDA. The views differ by rounding only.
    auto: as the run began; a new one: fused, dali without CUDA or a C compiler."""
    jpeg_engine: Literal["on", "off"] = "on"
    """On CUDA, decode JPEGs by the GPU's hardware engine where it has one; its pixels may differ from the others'."""
    outside: bool = False
    """Let a list file name images outside of its own folder."""
    max_failed: int | None = None
    """Images that may turn out broken, others standing in, before the run stops; None: 0.1 %, at least 10.
    Holds for those that features are judged on as well."""


@dataclass(frozen=True)
class Model:
    """Backbone, heads and loss."""

    arch: Annotated[str, tyro.conf.arg(aliases=["-a"])] = "vit_small"
    """Backbone: vit_small, vit_base, vit_conv_small, vit_conv_base, a torchvision ResNet, or any timm name."""
    embed_dim: int | None = None
    """Width of a vit_* backbone; None: as the name says."""
    depth: int | None = None
    """Blocks of a vit_* backbone; None: as the name says."""
    num_heads: int | None = None
    """Attention heads of a vit_* backbone; None: as the name says."""
    heads: Literal["auto", "vit", "resnet"] = "auto"
    """Layout of projector and predictor. auto: vit for transformers, resnet for convolutional networks."""
    moco_dim: int = 256
    """Output dimension of projector and predictor."""
    moco_mlp_dim: int = 4096
    """Hidden dimension of projector and predictor."""
    moco_m: float = 0.99
    """Momentum coefficient of the momentum encoder (start value with --moco-m-cos)."""
    moco_m_cos: bool = False
    """Raise the momentum coefficient to 1 by a half cosine, per iteration."""
    moco_t: float = 1.0
    """Temperature of the softmax."""
    stop_grad_conv1: bool = False
    """Freeze the patch projection of a ViT; a conv stem is not affected."""

    @property
    def backbone(self) -> dict[str, int]:
        """The overrides that `MoCoV3.build` takes as `backbone`."""
        sizes = {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}
        return {name: value for name, value in sizes.items() if value is not None}


@dataclass(frozen=True)
class Optim:
    """Optimizer and schedules."""

    epochs: int = 100
    """Length of the schedule, in passes over the training images."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 4096
    """Images a step over all ranks."""
    optimizer: Literal["lars", "adamw"] = "lars"
    """LARS for ResNets, AdamW for transformers."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 0.6
    """Base learning rate; the peak is lr x batch size / 256."""
    momentum: float = 0.9
    """Momentum of LARS; AdamW has none."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 1e-6
    """Weight decay."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up from 0."""
    clip_grad: float | None = None
    """Scale gradients down to this norm, over all parameters, where theirs is larger; None: never."""
    seed: int = 0
    """Of the initial weights, the order of the images and every augmentation."""


@dataclass(frozen=True)
class Run:
    """Where and how to run."""

    out: Path = tyro.MISSING
    """Folder of the run; the same command goes on where it stopped."""
    resume: Path | None = None
    """Checkpoint to start a new --out from, of train_ddp.py or of the reference release (.pth.tar).
    A run in --out needs none: it goes on by itself."""
    max_steps: int | None = None
    """Stop after this many steps of the schedule."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU, or the CPU where the machine has none."""
    amp: Literal["auto", "bf16", "fp16", "tf32", "off"] = "auto"
    """Autocast. auto: bf16, fp16 below compute capability 8.0, off on the CPU.
    Without autocast, a GPU multiplies float32 with all bits (off), or faster with 10 bits of mantissa (tf32)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the encoders. auto: on for CUDA where there is a C compiler."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters and inputs; float64 is for checks."""
    microbatch: int | None = None
    """Images of a rank that are in the backbone at once: same loss and gradients, less memory, more time.
    For backbones without batch norm and dropout."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the backbone's blocks and compute them again for the gradient: less memory, more time."""
    deterministic: bool = False
    """The same command gives the same numbers bit for bit, also on a GPU, where it may be slower."""
    on_nan: Literal["skip", "stop"] = "stop"
    """When loss or gradients are not finite, that step changes nothing; then stop at the next log line, or go on.
    A hundred such steps in a row end the run either way."""
    knn: bool = True
    """k-NN accuracy before the first step and after the last (needs val/ and classes)."""
    knn_every: int = 0
    """Also every this many epochs and at the last step, logged as `knn`; 0: not."""
    log_every: int = 10
    """Steps between two reads of the metrics: the only times that the step waits for the device."""
    keep: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int | None = None
    """Epochs between checkpoints that are kept for good, besides the newest; None: no others."""
    save_every: str | None = None
    """Steps (500) or minutes (30min) between checkpoints, besides those at the end of each epoch; None: no others."""
    timeout: int = 1800
    """Seconds that ranks wait for each other before the run ends."""

    @property
    def save_steps(self) -> int | None:
        """`--save-every` in steps, if it is."""
        return int(self.save_every) if self.save_every and self.save_every.isdecimal() else None

    @property
    def save_minutes(self) -> float | None:
        """`--save-every` in minutes, if it is."""
        return float(self.save_every.removesuffix("min")) if self.save_every and self.save_steps is None else None


@dataclass(frozen=True)
class Config:
    """Everything that `train_ddp.py` takes."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)

    def check(self, world_size: int) -> None:
        """Raise `ConfigError` for values that cannot work, before anything is built."""
        shown = str(self.run.out).encode(errors="replace").decode()
        if shown != str(self.run.out):
            raise ConfigError(f"--out {shown} is no UTF-8, which TensorBoard asks for; rename it")
        batch = self.optim.batch_size
        if batch < 2:
            raise ConfigError(f"--batch-size {batch}: the contrastive loss needs at least 2 images a step")
        check_divisible(batch, world_size)
        if self.model.backbone and not self.model.arch.startswith("vit_"):
            flags = " ".join(f"--{name.replace('_', '-')} None" for name in self.model.backbone)
            raise ConfigError(f"--arch {self.model.arch} has no width and depth; if the name is right, add {flags}")
        if not 0 < self.data.crop_min <= 1:
            raise ConfigError(f"--crop-min {self.data.crop_min} is not above 0 and at most 1")
        if not 0 <= self.model.moco_m <= 1:
            raise ConfigError(f"--moco-m {self.model.moco_m} is not between 0 and 1")
        if not 0 <= self.optim.warmup_epochs <= self.optim.epochs:
            warmup, epochs = self.optim.warmup_epochs, self.optim.epochs
            raise ConfigError(f"--warmup-epochs {warmup} is not between 0 and --epochs {epochs}; set both")
        for flag, number in {
            "--lr": self.optim.lr,
            "--weight-decay": self.optim.weight_decay,
            "--momentum": self.optim.momentum,
        }.items():
            if not 0 <= number < math.inf:
                raise ConfigError(f"{flag} {number} is not a finite number of at least 0")
        positive = {
            "--epochs": self.optim.epochs,
            "--image-size": self.data.image_size,
            "--moco-t": self.model.moco_t,
            "--moco-dim": self.model.moco_dim,
            "--moco-mlp-dim": self.model.moco_mlp_dim,
            "--log-every": self.run.log_every,
            "--timeout": self.run.timeout,
            "--keep-every": self.run.keep_every,
            "--workers": self.data.workers,
            "--max-steps": self.run.max_steps,
            "--microbatch": self.run.microbatch,
            "--clip-grad": self.optim.clip_grad,
            **{f"--{name.replace('_', '-')}": value for name, value in self.model.backbone.items()},
        }
        for flag, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag} {value} is not positive and finite")
        if self.run.knn_every and not self.run.knn:
            raise ConfigError(f"--knn-every {self.run.knn_every} with --no-knn: leave one of them out")
        if self.run.save_every is not None and not re.fullmatch(_INTERVAL, self.run.save_every):
            raise ConfigError(f"--save-every {self.run.save_every}: give steps, as in 500, or minutes, as in 30min")
        counts = {
            "--keep": self.run.keep,
            "--knn-every": self.run.knn_every,
            "--seed": self.optim.seed,
            "--max-failed": self.data.max_failed or 0,
        }
        for flag, count in counts.items():
            if count < 0:
                raise ConfigError(f"{flag} {count} is negative; use 0 or more")
        if self.optim.seed >= 2**62:  # with an epoch added it is to have 64 bits
            raise ConfigError(f"--seed {self.optim.seed} is too large; use less than 2**62")
        if self.run.dtype == "float64" and self.run.amp not in ("auto", "off"):
            raise ConfigError(f"--dtype float64 with --amp {self.run.amp}: it would have fewer bits; use --amp off")

    def flags(self) -> dict[str, Any]:
        """Every value under its flag's name, JSON-ready: what `config.json` holds."""
        sections = (self.data, self.model, self.optim, self.run)
        flat = {key: value for section in sections for key, value in vars(section).items()}
        return json.loads(json.dumps(flat, default=str))


def check_divisible(batch: int, world_size: int) -> None:
    """Raise `ConfigError`, naming the nearest batches that would do, if ranks cannot share a global batch equally."""
    if batch % world_size:
        below = batch // world_size * world_size
        near = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ConfigError(f"--batch-size {batch} is not divisible by world size {world_size}; use {near}")


# May differ when a run goes on; every other flag changes what is learned and must agree.
FREE = frozenset(
    (
        "data",
        "workers",
        "augment",
        "outside",
        "max_failed",
        "out",
        "resume",
        "max_steps",
        "device",
        "compile",
        "microbatch",
        "checkpoint_activations",
        "deterministic",
        "on_nan",
        "knn",
        "knn_every",
        "log_every",
        "keep",
        "keep_every",
        "save_every",
        "timeout",
    )
)


def disagreements(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Flags that change learning and differ between a recorded run and this command, as readable phrases."""
    there = {**Config().flags(), **recorded}  # a flag younger than the run was at its default
    names = sorted((there.keys() | current.keys()) - FREE)
    return [
        disagreement(name, there.get(name), current.get(name)) for name in names if there.get(name) != current.get(name)
    ]


def disagreement(name: str, there: Any, here: Any) -> str:
    """The phrase for one flag, named as in `Config`, that differs between a recorded run and this command."""
    return f"--{name.replace('_', '-')} is {there} there, {here} here"


def parse(argv: list[str], quiet: bool = False) -> Config:
    """Turn `[PRESET] --flag value …` into a `Config`; tyro prints help (exit 0) and flag errors (exit 2),
    unless `quiet`.

    Raises:
        ConfigError: the preset is not known.
    """
    from trainer.presets import DEFAULT, PRESETS, overview

    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (DEFAULT, argv)
    if name not in PRESETS:
        raise ConfigError(f"preset {name} is not known; choose from: {', '.join(PRESETS)}")
    return tyro.cli(
        Config,
        prog=f"train_ddp.py {name}" if argv and argv[0] == name else "train_ddp.py [PRESET]",
        description=f"Pre-train with MoCo v3. The flags override the preset {name}.\n\n{overview()}",
        default=PRESETS[name](),
        args=flags,
        console_outputs=not quiet,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def replace(config: Config, **flags: Any) -> Config:
    """A copy with flags changed, each found in the section that has it."""
    sections = {}
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        mine = {key: flags.pop(key) for key in list(flags) if hasattr(section, key)}
        sections[item.name] = dataclasses.replace(section, **mine)
    if flags:
        raise TypeError(f"no such flags: {', '.join(flags)}")
    return Config(**sections)
