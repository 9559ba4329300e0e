"""What `evaluate.py` has learned after each epoch, for the same command to go on with; in the end, the weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from dali_pipes.replacing import replacing
from evaluation.accuracy import Accuracy, Done
from trainer.distributed import World, gathered
from trainer.saving import copy_aside

FORMAT = 1


class Learner(Protocol):
    """What is trained: evaluation's `Heads` or `FineTuning`."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class EvaluationFile:
    """RUN/eval/NAME.pt: written by rank 0, read by all."""

    def __init__(self, file: Path, identity: dict[str, Any], world: World, warn: Callable[[str], None]) -> None:
        """`identity`: of plain values, all that the result depends on; a file of another one is begun anew."""
        self._file, self._identity, self._world, self._warn = file, identity, world, warn

    def go_on(self, learner: Learner) -> Done | None:
        """Give the learner the state that an interrupted evaluation left; returns what that one has come to.

        None if there is no such, or not on every rank. Every rank must call it.
        """
        unfinished = self._read() if self._file.exists() else None
        epochs = gathered(len(unfinished["accuracies"]) if unfinished is not None else 0)
        if unfinished is None or len(set(epochs)) > 1:
            return None
        learner.load_state_dict(unfinished["state"])
        accuracies = [[Accuracy(**each) for each in epoch] for epoch in unfinished["accuracies"]]
        return Done(accuracies, unfinished["losses"])

    def _read(self) -> dict[str, Any] | None:
        try:
            found = torch.load(self._file, map_location="cpu", weights_only=True)
            same = found["format"] == FORMAT and found["identity"] == self._identity
            unfinished: dict[str, Any] | None = found["unfinished"]
        except Exception as error:  # whatever bytes are in it: torch raises many types for what it cannot read
            self._say(f"{self._file} cannot be read ({type(error).__name__}); beginning anew")
            return None
        if not same and unfinished is not None:
            self._say(f"{self._file} was begun for another step, other images or flags; beginning anew")
        return unfinished if same else None

    def save(self, learner: Learner, done: Done, ended: bool) -> None:
        """After an epoch; what is only needed to go on is left out once the last one has ended.

        A file that cannot be written costs a warning: the result does not need it.
        """
        if self._world.rank:
            return
        state = copy_aside(learner.state_dict(), None)  # on the CPU, so that a machine without a GPU can read it
        content: dict[str, Any] = {"format": FORMAT, "identity": self._identity, "unfinished": None}
        if ended:
            content |= {name: part for name, part in state.items() if name not in ("optimizer", "scaler")}
        else:
            content["unfinished"] = {**dataclasses.asdict(done), "state": state}
        try:
            with replacing(self._file) as stream:
                torch.save(content, stream)
        except OSError as error:
            self._say(f"{self._file} cannot be written: {error.strerror}; after an interruption, this epoch is lost")

    def _say(self, line: str) -> None:
        if self._world.rank == 0:
            self._warn(line)
