"""What `evaluate.py` has learned: after each epoch, for the same command to go on with; in the end, the weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from dali_pipes.replacing import replacing
from evaluation.accuracy import Accuracy, Done
from trainer.distributed import World, gathered
from trainer.saving import copy_aside

FORMAT = 3
WEIGHTS, UNFINISHED = ".pt", ".unfinished.pt"  # endings of the files, behind RUN/eval/NAME


class Learner(Protocol):
    """What is trained: evaluation's `Heads` or `FineTuning`."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class EvaluationFile:
    """What an evaluation leaves beside its result: written by rank 0, read by all.

    What was learned before under the same name stays until this one has ended.
    """

    def __init__(
        self, unfinished: Path, weights: Path, identity: dict[str, Any], world: World, warn: Callable[[str], None]
    ) -> None:
        """`identity`: of plain values, all that the result depends on; what is unfinished of another is begun anew."""
        self._file, self._weights, self._identity, self._world, self._warn = unfinished, weights, identity, world, warn

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
            unfinished: dict[str, Any] = found["unfinished"]
        except Exception as error:  # whatever bytes are in it: torch raises many types for what it cannot read
            self._say(f"{self._file} cannot be read ({type(error).__name__}); beginning anew")
            return None
        if not same:
            self._say(f"{self._file} was begun for another step, other images or flags; beginning anew")
        return unfinished if same else None

    def save(self, learner: Learner, done: Done) -> None:
        """After an epoch. A file that cannot be written costs a warning: the result does not need it."""
        unfinished = {**dataclasses.asdict(done), "state": learner.state_dict()}
        content = {"format": FORMAT, "identity": self._identity, "unfinished": unfinished}
        self._write(self._file, content, "after an interruption, this epoch is lost")

    def save_weights(self, learner: Learner) -> None:
        """After the last epoch: without what is only needed to go on. Failing costs a warning, as in `save`."""
        state = learner.state_dict()
        content = {name: part for name, part in state.items() if name not in ("optimizer", "scaler")}
        self._write(
            self._weights,
            {"format": FORMAT, "identity": self._identity, **content},
            "the weights of this evaluation are lost",
        )

    def _write(self, file: Path, content: dict[str, Any], consequence: str) -> None:
        if self._world.rank:
            return
        try:
            with replacing(file) as stream:
                torch.save(copy_aside(content, None), stream)  # on the CPU: a machine without a GPU can read it
        except OSError as error:
            self._say(f"{file} cannot be written: {error.strerror}; {consequence}")

    def _say(self, line: str) -> None:
        if self._world.rank == 0:
            self._warn(line)
