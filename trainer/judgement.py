"""What a run came to: k-NN accuracy of the features, and the summary in words and numbers."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from dali_pipes import DatasetIndex, EvalLoader
from evaluation import knn
from trainer.config import Config
from trainer.engine import Engine, autocast
from trainer.metrics import METRICS, Display, read_metrics
from trainer.run_folder import write_atomically

SUMMARY = "summary.json"
_NUMBERS = ("steps", "loss_first", "loss_last", "knn_before", "knn_after", "images_per_second", "data_wait")


def judgeable(
    config: Config, index: DatasetIndex, val: DatasetIndex | None, ranks: int, display: Display
) -> tuple[DatasetIndex, DatasetIndex] | None:
    """The bank and the queries of the k-NN accuracy; None, saying why, if it was asked for and cannot be had."""
    if not config.run.knn:
        return None
    if val is None:
        display.say(f"no k-NN accuracy: {config.data.data} has no train/ and val/ with images")
        return None
    if len(val) < ranks:
        display.say(f"no k-NN accuracy: val/ has {len(val)} images for {ranks} ranks")
        return None
    if val.classes != index.classes or len(index.classes) < 2:
        display.say("no k-NN accuracy: train/ and val/ do not have the same class folders, at least two")
        return None
    return index, val


def judge(engine: Engine, index: DatasetIndex, val: DatasetIndex, threads: int, display: Display) -> float | None:
    """k-NN accuracy (0 to 1) of the base encoder's backbone as it stands: bank `index`, queries `val`.

    What is known to have gone bad since the scan is left out of the bank. None, saying so, if the memory is not enough:
    a run is not lost for its judgement.
    """
    try:
        return _accuracy(engine, index, val, threads)
    except torch.OutOfMemoryError:
        display.say("no k-NN accuracy: the features of the whole dataset do not fit into memory")
        return None
    finally:
        engine.model.train()


def _accuracy(engine: Engine, index: DatasetIndex, val: DatasetIndex, threads: int) -> float:
    config, size = engine.config, engine.config.data.image_size

    def features(images: torch.Tensor) -> torch.Tensor:
        with autocast(config, engine.device):
            return engine.model.features(images.to(engine.dtype))

    parts = []
    engine.model.eval()
    for each in (index.without(engine.loader.failed), val):
        loader = EvalLoader(
            each,
            batch_size=max(1, min(256, config.optim.batch_size // engine.world.size)),
            resize=round(size * 256 / 224),
            crop=size,
            rank=engine.world.rank,
            world_size=engine.world.size,
            device=str(engine.device),
            num_threads=threads,
        )
        parts.append(knn.extract(features, loader))
        loader.close()
    (bank, bank_labels), (queries, labels) = parts
    return knn.accuracy(bank, bank_labels, queries, labels)


def read_summary(out: Path) -> dict[str, Any] | None:
    """`summary.json` of a run that ended; None if there is none, or a damaged one."""
    try:
        summary = json.loads((out / SUMMARY).read_bytes())
        numbers = [summary[name] for name in _NUMBERS]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, IndexError):
        return None
    whole = isinstance(summary["steps"], int) and all(isinstance(number, int | float | None) for number in numbers)
    return summary if whole else None


def write_summary(engine: Engine, out: Path, knn_after: float | None) -> dict[str, Any]:
    """Write `summary.json` of a run that ended, and return it."""
    rows = read_metrics(out)
    summary = {
        "steps": engine.step,
        "epochs": engine.step / engine.steps_per_epoch,
        "loss_first": rows[0]["loss"] if rows else None,
        "loss_last": rows[-1]["loss"] if rows else None,
        "knn_before": engine.notes.get("knn_before"),
        "knn_after": knn_after,
        "images_per_second": statistics.median(row["images_per_second"] for row in rows) if rows else None,
        "data_wait": statistics.median(row["data_wait"] for row in rows) if rows else None,
        "training_seconds": engine.seconds,
        "ranks": engine.world.size,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    write_atomically(out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def conclude(result: dict[str, Any], out: Path, display: Display) -> None:
    """The end of a run in a few lines."""
    if result["loss_first"] is not None:
        display.say(f"loss   {result['loss_first']:.3f} -> {result['loss_last']:.3f} in {result['steps']} steps")
    if result["knn_after"] is not None:
        before = f"{result['knn_before']:.1%} -> " if result["knn_before"] is not None else ""
        display.say(f"k-NN   {before}{result['knn_after']:.1%}")
    if result["images_per_second"] is not None:
        display.say(f"speed  {result['images_per_second']:.0f} images/s, waiting for data {result['data_wait']:.0%}")
    display.say(f"files  {out}: checkpoints, {METRICS}, {SUMMARY}; tensorboard --logdir {out}")
