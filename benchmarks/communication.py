"""What ranks tell each other in a step, and what that would cost on more GPUs: a count, and a prediction from it.

    python -m benchmarks.communication [--preset vit-b-300ep] [--batch-size 256] [--step-ms 180] [--network 50] [--help]

The bytes are those of the model's own tensors. The times are predicted, not measured:

    gradients   ring all-reduce of B bytes     2 (n - 1) / n x B / bandwidth
    keys        all-gather of B bytes a rank       (n - 1) x B / bandwidth
    statistics  of synchronised batch norm: forward as keys, backward as gradients
    each collective begins with                ceil(log2 n) x latency
    exposed     all of it (an upper bound: the keys travel beside the queries' forward pass, until a batch norm is to
                be synchronised there), but for the gradients: what their all-reduce takes beyond the backward pass, and
                at least the last bucket, which nothing is left to hide
    efficiency  step / (step + exposed)
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.results import ResultError
from benchmarks.step_runs import CACHED
from benchmarks.tables import number
from model.sync_bn import SyncBatchNorm
from trainer.config import Config, ConfigError, replace
from trainer.engine import build_model
from trainer.presets import PRESETS

BUCKET = 25 * 2**20  # bytes, DDP's default
FLOAT32 = 4
PASSES = 2  # one a view


@dataclass(frozen=True)
class Communication:
    """Bytes a step and rank, and the scaling predicted from them."""

    preset: str = "vit-b-300ep"
    """Of train_ddp.py."""
    batch_size: int = 256
    """Images a step and GPU."""
    gpus: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of GPUs to predict for."""
    gpus_a_node: int = 8
    """Up to so many the links within a node count, beyond it the network."""
    amp: bool = True
    """Keys in two bytes, as under autocast."""
    step_ms: float | None = None
    """Of one GPU; None: the step on a cached batch in --results, measured on a GPU."""
    backward_share: float = 0.5
    """Of the step: what gradients can hide behind."""
    nvlink: float = 450.0
    """Assumed GB/s of a GPU to the others of its node, one direction."""
    network: float = 50.0
    """Assumed GB/s of a GPU to other nodes (50: a 400 Gbit/s adapter for each)."""
    latency_us: float = 15.0
    """Assumed microseconds of a collective for each doubling of the ranks."""
    results: Path = Path("benchmarks/results")
    """Folder of measured results."""
    json: Path | None = None
    """Also write everything here."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank's own tensors in a step, and the collectives that carry them."""

    gradients: int
    keys: int
    statistics: int  # forward: mean, variance and count of each synchronised batch norm
    statistics_gradients: int
    key_gathers: int
    norm_gathers: int
    norm_reduces: int

    @property
    def buckets(self) -> int:
        """All-reduces of gradients."""
        return max(1, math.ceil(self.gradients / BUCKET))


@dataclass(frozen=True)
class Prediction:
    """Of `gpus` GPUs; times in milliseconds a step."""

    gpus: int
    sent_mb: float  # by a rank
    gradients_ms: float
    keys_ms: float
    statistics_ms: float
    exposed_ms: float | None  # None: without a step's time
    efficiency: float | None


def traffic(config: Config, batch: int, amp: bool) -> Traffic:
    """Counted on the model that `config` builds, with `batch` images a rank."""
    with torch.device("meta"):
        moco = build_model(config)
    trained, slow = (
        [each for part in parts for each in part.modules() if isinstance(each, SyncBatchNorm)]
        for parts in ((moco.base_encoder, moco.predictor), (moco.momentum_encoder,))
    )
    return Traffic(
        gradients=sum(p.numel() * p.element_size() for p in moco.parameters() if p.requires_grad),
        keys=PASSES * batch * config.model.moco_dim * (2 if amp else FLOAT32),
        statistics=PASSES * sum((2 * norm.num_features + 1) * FLOAT32 for norm in (*trained, *slow)),
        statistics_gradients=PASSES * sum(2 * norm.num_features * FLOAT32 for norm in trained),
        key_gathers=PASSES,
        norm_gathers=PASSES * (len(trained) + len(slow)),
        norm_reduces=PASSES * len(trained),
    )


def predict(t: Traffic, gpus: int, flags: Communication, step_ms: float | None) -> Prediction:
    """By the formulas at the top of this file."""
    if gpus == 1:
        return Prediction(1, 0.0, 0.0, 0.0, 0.0, *((0.0, 1.0) if step_ms else (None, None)))
    bandwidth = flags.nvlink if gpus <= flags.gpus_a_node else flags.network
    start_ms = math.ceil(math.log2(gpus)) * flags.latency_us / 1000
    ring, gather = 2 * (gpus - 1) / gpus, gpus - 1

    def milliseconds(sent: float, collectives: int) -> float:
        return sent / (bandwidth * 1e9) * 1000 + collectives * start_ms

    gradients = milliseconds(ring * t.gradients, t.buckets)
    keys = milliseconds(gather * t.keys, t.key_gathers)
    statistics = milliseconds(gather * t.statistics, t.norm_gathers)
    statistics += milliseconds(ring * t.statistics_gradients, t.norm_reduces)
    sent = ring * (t.gradients + t.statistics_gradients) + gather * (t.keys + t.statistics)
    exposed = efficiency = None
    if step_ms is not None:
        hidden_until = gradients - flags.backward_share * step_ms
        exposed = max(hidden_until, gradients / t.buckets) + keys + statistics
        efficiency = step_ms / (step_ms + exposed)
    return Prediction(gpus, sent / 1e6, gradients, keys, statistics, exposed, efficiency)


def measured_step(folder: Path, arch: str, batch: int) -> tuple[float, str] | None:
    """Milliseconds of the newest step of that architecture and batch that was measured on a GPU, and where."""
    found = []
    for file in sorted(folder.glob("step-*.json")):
        result = results.read(file)
        gpu, shape = result.environment["gpu"], (result.subject, result.configuration.get("batch_size"))
        if gpu is not None and shape == (arch, batch) and not result.quick:
            ms = result.find("step", CACHED, "ms/step").estimate.median
            found.append((result.created, ms, f"{file.name}: {gpu['name']}, {result.setting}"))
    return max(found)[1:] if found else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 wrong use."""
    flags = tyro.cli(Communication, prog="python -m benchmarks.communication", args=argv)
    try:
        config = _checked(flags)
        step = (flags.step_ms, "--step-ms") if flags.step_ms else None
        step = step or measured_step(flags.results, config.model.arch, flags.batch_size)
    except (ConfigError, ResultError) as error:
        print(f"benchmarks.communication: error: {error}", file=sys.stderr)
        return 2
    t = traffic(config, flags.batch_size, flags.amp)
    predictions = [predict(t, gpus, flags, step[0] if step else None) for gpus in flags.gpus]
    _show(flags, config, t, predictions, step)
    if flags.json is not None:
        record = {
            "traffic": asdict(t),
            "assumed": asdict(flags),
            "step": step,
            "predictions": [asdict(p) for p in predictions],
        }
        try:
            flags.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
        except OSError as error:
            print(f"benchmarks.communication: error: --json {flags.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def _checked(flags: Communication) -> Config:
    if flags.preset not in PRESETS:
        raise ConfigError(f"--preset {flags.preset} is not known; choose from: {', '.join(PRESETS)}")
    positive = {
        "--batch-size": flags.batch_size,
        "--gpus": min(flags.gpus, default=0),
        "--gpus-a-node": flags.gpus_a_node,
        "--nvlink": flags.nvlink,
        "--network": flags.network,
        "--step-ms": flags.step_ms,
    }
    for flag, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{flag} {value} is not positive")
    if not 0 <= flags.backward_share <= 1:
        raise ConfigError(f"--backward-share {flags.backward_share} is no share; use 0 to 1")
    if not 0 <= flags.latency_us < math.inf:
        raise ConfigError(f"--latency-us {flags.latency_us} is no time; use 0 or more")
    return replace(PRESETS[flags.preset](), data=Path("unused"), out=Path("unused"))


def _show(
    flags: Communication,
    config: Config,
    t: Traffic,
    predictions: Sequence[Prediction],
    step: tuple[float, str] | None,
) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    counted = Table(f"{config.model.arch}, {flags.batch_size} images a GPU", box=None, pad_edge=False)
    for title in ("MB a rank and step", "collectives"):
        counted.add_column(title, justify="right")
    for name, size, calls in (
        ("gradients, all-reduce", t.gradients, t.buckets),
        ("keys, all-gather", t.keys, t.key_gathers),
        ("batch-norm statistics, all-gather", t.statistics, t.norm_gathers),
        ("their gradients, all-reduce", t.statistics_gradients, t.norm_reduces),
    ):
        counted.add_row(name, number(size / 1e6), str(calls))
    console.print(counted)
    console.print()
    table = Table("PREDICTION: GPUs", box=None, pad_edge=False)
    for title in ("MB sent by a rank", "gradients, ms", "keys, ms", "statistics, ms", "exposed, ms", "efficiency"):
        table.add_column(title, justify="right")
    for p in predictions:
        table.add_row(
            str(p.gpus),
            *(number(v) for v in (p.sent_mb, p.gradients_ms, p.keys_ms, p.statistics_ms)),
            "" if p.exposed_ms is None else number(p.exposed_ms),
            "" if p.efficiency is None else f"{p.efficiency:.1%}",
        )
    console.print(table)
    links = f"{flags.nvlink:g} GB/s within a node of {flags.gpus_a_node}, {flags.network:g} GB/s beyond"
    console.print(f"- Assumed: {links}, {flags.latency_us:g} us a collective and doubling. Nothing here is measured.")
    if step:
        console.print(f"- A step of one GPU takes {number(step[0])} ms ({step[1]}).", markup=False)
    else:
        console.print("- No step was measured on a GPU with this batch: give --step-ms for exposure and efficiency.")


if __name__ == "__main__":
    sys.exit(main())
