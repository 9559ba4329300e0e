"""Who does what follows the crop: DALI's operators, which run anywhere, or the fused kernels, where they can."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from dali_pipes import fused, graph
from dali_pipes.views import Recipe

Augment = Literal["fused", "dali"]


def why_not_fused(device: torch.device, recipe: Recipe) -> str | None:
    """Why the fused kernels cannot make these views on that device, as one phrase; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "no triton, which comes with torch's CUDA builds"
    if device.type != "cuda" and not fused.interpreted():
        return f"device {device} runs no Triton kernels"
    try:
        for spec in recipe.views:
            fused.check_spec(spec)
    except ValueError as error:
        return str(error)
    missing = missing_c_compiler() if device.type == "cuda" else None
    return f"no {missing}" if missing else None


def output_types(augment: str, device: torch.device, recipe: Recipe) -> tuple[str, ...]:
    """The types of views that a back end can give; ValueError if it is unknown, or cannot make these there."""
    if augment == "dali":
        return graph.OUTPUTS
    if augment != "fused":
        raise ValueError(f"augment {augment!r} is neither fused nor dali")
    if (reason := why_not_fused(device, recipe)) is not None:
        raise ValueError(f"augment fused: {reason}; use augment dali")
    return fused.OUTPUTS


def missing_c_compiler() -> str | None:
    """What this machine lacks to build the C extension by which Triton launches a kernel; None if nothing."""
    # Both as Triton looks for them (runtime/build.py), where another rule would find what it does not, or the reverse.
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"C compiler ({' or '.join(names)}) on the PATH"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own, for which no headers are installed
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return None if header.exists() else f"{header} (on Debian and Ubuntu: python3-dev)"
