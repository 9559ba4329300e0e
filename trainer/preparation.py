"""Everything that can be found out before ranks meet: is the command sound, whose is the run folder, where to go on."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch

from dali_pipes import DatasetError, DatasetIndex
from dali_pipes.augment import missing_c_compiler, why_not_fused
from dali_pipes.counting import scan_shown
from dali_pipes.failures import tolerated
from dali_pipes.listing import beside_training_tree, training_tree, validation_tree
from dali_pipes.replacing import write_atomically
from model import MoCoV3
from trainer import checkpoint, resume
from trainer import config as configuration
from trainer.config import Config, ConfigError
from trainer.distributed import World, choose_device
from trainer.engine import build_model, recipe
from trainer.metrics import Display, forget
from trainer.microbatch import check_microbatch
from trainer.run_folder import RunFolder
from trainer.signals import Stopped
from trainer.status import write_status

TRAIN_INDEX, VAL_INDEX = "train_index.npz", "val_index.npz"
SET_ASIDE = "set_aside.txt"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Start:
    """What rank 0 found out and every rank acts on."""

    config: Config
    checkpoint: Path | None
    state: dict[str, Any] | None = None  # what is in it, where it was read already: on rank 0
    gone: list[int] = field(default_factory=list)  # rows of the index that are known to be bad by now
    has_val: bool = False  # whether there are images to judge features on
    bound: bool = False  # it goes on, and must learn the same
    device: str = "cpu"  # kind of rank 0's
    step: int = 0  # that the run has taken
    folder: RunFolder | None = None  # rank 0 holds its lock


def prepare(argv: list[str], world: World, display: Display) -> Start:
    """Check everything that can be checked before ranks meet, then claim the run folder. For rank 0.

    Raises:
        ConfigError, DatasetError: what is wrong and how to mend it; nothing was written.
    """
    config = configuration.parse(argv)
    config.check(world.size)
    device = choose_device(config.run.device, world)
    folder = RunFolder(config.run.out)
    try:
        return _prepare(config, world, device, folder, display)
    except Stopped:  # a long scan is as good a moment for a machine to be taken away as any
        with suppress(ConfigError, OSError):
            folder.recorded()  # it is a run's or a new one
            folder.lock()  # and no other process's
            write_status(config.run.out, "preempted", None, "while the images were looked at")
        folder.release()
        raise
    except BaseException:
        folder.release()
        raise


def _prepare(config: Config, world: World, device: torch.device, folder: RunFolder, display: Display) -> Start:
    recorded = folder.recorded()
    if recorded is not None:
        folder.lock(display.say)
        recorded = folder.recorded()  # as it is now, and stays
    file, state, warnings = checkpoint.newest_state(config.run.out)
    if file is None:
        recorded = None  # nothing was learned there yet, so nothing binds
    config = resolve(config, device, display.say, recorded["flags"] if recorded else {})

    tree, val_tree = training_tree(config.data.data), validation_tree(config.data.data)
    index = _scan(tree, display, config.data.outside)
    if not index.classes and (others := beside_training_tree(config.data.data)):
        display.say(
            f"{tree} has images and no class folders; not read is {others[0]}/ beside it, and {len(others) - 1} more. "
            f"If train is a class like these, give --data a folder in which {config.data.data} is called train"
        )
    origin = config.run.out if recorded is not None else config.run.resume and config.run.resume.parent
    index, gone = _as_started(index, origin, config, display) if origin else (index, [])
    val = _scan_val(val_tree, display, config.data.outside) if val_tree is not None and config.run.knn else None
    images = len(index)
    if config.optim.batch_size > images:
        most = images // world.size * world.size
        mend = f"use at most {most}" if most else f"too few for {world.size} ranks"
        raise ConfigError(f"--batch-size {config.optim.batch_size}, but {tree} has {images} images; {mend}")
    try:
        model = build_model(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_microbatch(config.run.microbatch, config.model.arch, model)
    check_image_size(config, model)

    bound = recorded is not None
    if recorded is not None:
        folder.check(recorded, config, index.fingerprint)
        _check_resume(config, recorded["flags"].get("resume"))
    for warning in warnings:
        display.say(f"warning: {warning}; going on with the one before")
    if file is None and config.run.resume is not None:
        file = config.run.resume
        remarks, bound = resume.check(file, config, index.fingerprint, model)
        for remark in remarks:
            display.say(remark)

    if recorded is None:
        folder.lock(display.say)
        if any(config.run.out.glob("checkpoint_*.pt")):  # which would be replaced
            raise ConfigError(f"--out {config.run.out}: another process has trained there meanwhile; start once more")
        folder.claim(config, index.fingerprint)
        forget(config.run.out)  # what a start that came to no checkpoint has told is not of this run
    index.save(config.run.out / TRAIN_INDEX)
    (config.run.out / VAL_INDEX).unlink(missing_ok=True)
    if val is not None:
        val.save(config.run.out / VAL_INDEX)
    _report([*index.rejected, *(val.rejected if val is not None else [])], config.run.out / SET_ASIDE, display)
    folder.sweep()
    if not folder.has_locks:
        display.say(f"warning: the filesystem of {config.run.out} has no locks; start only one run in that folder")
    step = state["step"] if state else 0
    return Start(config, file, state, gone, val is not None, bound, device.type, step, folder)


def check_image_size(config: Config, model: MoCoV3) -> None:
    """Raise `ConfigError` if the backbone, timm's own for instance, cannot read images of that size: it reads one."""
    size, arch = config.data.image_size, config.model.arch
    model.eval()
    try:
        with torch.no_grad():
            model.features(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason, known = " ".join(str(error).split())[:200], timm.get_pretrained_cfg(arch)
        own = known.input_size[-1] if known is not None else 224
        raise ConfigError(f"--arch {arch} does not take --image-size {size} ({reason}); try {own}") from None
    finally:
        model.train()


def resolve(
    config: Config, device: torch.device, say: Callable[[str], None], recorded: Mapping[str, Any] = NOTHING
) -> Config:
    """Replace what is `auto` by what it means on this device; a run that goes on keeps what is `recorded` of it.

    Raises:
        ConfigError: a flag asks for what cannot run here.
    """
    amp: str = config.run.amp
    if amp == "auto":
        if "amp" in recorded:
            amp = recorded["amp"]
        elif device.type == "cpu" or config.run.dtype == "float64":
            amp = "off"
        else:
            amp = "bf16" if _is_modern(device) else "fp16"
    if (amp == "tf32" or (amp == "bf16" and device.type == "cuda")) and not _is_modern(device):
        mend = f"use --amp {'off' if amp == 'tf32' else 'fp16'}"
        if recorded.get("amp") == amp:
            mend = f"the run in --out {config.run.out} began with it and goes on where there is one"
        raise ConfigError(f"--amp {amp}: {device} has none, GPUs of compute capability 8.0 or more have; {mend}")
    compile_: str = config.run.compile
    if compile_ == "auto":
        compile_ = "on" if device.type == "cuda" else "off"
    missing = _missing_compiler(device) if compile_ == "on" else None
    if missing is not None:
        say(f"no {missing}: running eager, which is slower; install it to compile")
        compile_ = "off"
    augment = _resolved_augment(config, device, say, recorded.get("augment"))
    return configuration.replace(config, amp=amp, compile=compile_, augment=augment)


def _is_modern(device: torch.device) -> bool:
    """Whether it is a GPU that multiplies bfloat16 and TF32 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _resolved_augment(config: Config, device: torch.device, say: Callable[[str], None], before: str | None) -> str:
    wanted: str = config.data.augment
    if wanted == "auto":
        wanted = before or ("fused" if device.type == "cuda" else "dali")
        reason = why_not_fused(device, recipe(config)) if wanted == "fused" else None
        if reason is not None:
            say(f"{reason}: augmenting with DALI's operators, which is slower; the views differ by rounding")
            wanted = "dali"
    elif wanted == "fused" and (reason := why_not_fused(device, recipe(config))) is not None:
        raise ConfigError(f"--augment fused: {reason}; use --augment dali")
    elif before not in (None, wanted):
        say(f"--augment {wanted}, where the run began with {before}: its views differ by rounding from here on")
    return wanted


def _check_resume(config: Config, recorded: str | None) -> None:
    """Raise `ConfigError` if a run that goes on by itself is asked to start from something else than it did."""
    asked = config.run.resume
    if asked is not None and (recorded is None or Path(recorded).absolute() != asked.absolute()):
        began = f"from {recorded}" if recorded else "without one"
        raise ConfigError(
            f"--resume {asked}, but the run in --out {config.run.out} began {began} and goes on from its own newest "
            "checkpoint; leave --resume out, or name a new --out"
        )


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine: Triton builds a C extension, Inductor's CPU code is C++."""
    if device.type != "cpu":
        return missing_c_compiler()
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return None if any(map(shutil.which, names)) else f"C++ compiler ({' or '.join(names)}) on the PATH"


def _as_started(now: DatasetIndex, origin: Path, config: Config, display: Display) -> tuple[DatasetIndex, list[int]]:
    """The index of the run in `origin` and its rows that went bad since, if they are few and nothing else changed.

    Without it a run that outlived a bad file could not be continued: a new scan sets the file aside, and so has other
    rows; as has one that finds a file mended. An index that differs more is returned as it is, and refused by its
    fingerprint.

    Raises:
        ConfigError: more went bad than may, in the run that this one is.
    """
    file = origin / TRAIN_INDEX
    if not file.exists():
        return now, []
    try:
        started = DatasetIndex.load(file, tree=now.tree)
    except DatasetError:
        raise ConfigError(
            f"{file} is damaged; restore it, or remove it: without it a run goes on only if no image went bad since"
        ) from None
    again = started.found_again(now)
    if again is None:
        return now, []
    index, gone = again
    most = tolerated(len(index)) if config.data.max_failed is None else config.data.max_failed
    if gone:
        path = index.path(gone[0])
        bad = f"{len(gone)} images went bad since the run started, first {path}: {dict(index.rejected)[path]}"
    if len(gone) > most:
        if origin != config.run.out or len(gone) > len(index) // 2:  # another dataset with the same names
            return now, []
        raise ConfigError(f"{bad}; at most {most} may: restore them, or go on with --max-failed {len(gone)} or more")
    if mended := len(set(now.names).difference(index.names)):
        display.say(f"{mended} files were set aside when the run started; they can be read now, and stay out of it")
    if gone:
        display.say(f"{bad}; others stand in")
    return index, gone


def _scan_val(tree: Path, display: Display, outside: bool) -> DatasetIndex | None:
    try:
        return _scan(tree, display, outside)
    except DatasetError as error:
        display.say(f"no k-NN accuracy: {error}")
        return None


def _scan(tree: Path, display: Display, outside: bool) -> DatasetIndex:
    index = scan_shown(tree, outside, display.console)
    if index.rejected:
        path, reason = index.rejected[0]
        display.say(f"{tree}: {len(index.rejected)} files set aside, first {path}: {reason}")
    return index


def _report(rejected: list[tuple[str, str]], file: Path, display: Display) -> None:
    """Every file that no image is read from, with the reason, a line each."""
    if not rejected:
        file.unlink(missing_ok=True)
        return
    lines = "".join(f"{path}: {reason}\n" for path, reason in rejected)
    write_atomically(file, os.fsencode(lines))
    if len(rejected) > 1:
        display.say(f"all that was set aside, with the reasons: {file}")
