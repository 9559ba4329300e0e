"""What `evaluate.py` has learned after each epoch, for the same command to go on with; in the end, the weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from dali_pipes.replacing import replacing
from evaluation.accuracy import Accuracy, Done
from trainer.distributed import World, gathered

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
        found = self._read() if self._file.exists() else None
        done = found["done"] if found is not None else None
        epochs = gathered(len(done["accuracies"]) if done is not None else 0)
        if found is None or done is None or len(set(epochs)) > 1:
            return None
        learner.load_state_dict(found["state"])
        return Done([[Accuracy(**each) for each in epoch] for epoch in done["accuracies"]], done["losses"])

    def _read(self) -> dict[str, Any] | None:
        try:
            found = torch.load(self._file, map_location="cpu", weights_only=True)
            same = found["format"] == FORMAT and found["identity"] == self._identity
        except Exception as error:  # whatever bytes are in it: torch raises many types for what it cannot read
            self._say(f"{self._file} cannot be read ({type(error).__name__}); beginning anew")
            return None
        if not same and found["done"] is not None:
            self._say(f"{self._file} was begun for another step, other images or flags; beginning anew")
        return found if same else None

    def save(self, learner: Learner, done: Done, ended: bool) -> None:
        """After an epoch; what is only needed to go on is left out once the last one has ended.

        A file that cannot be written costs a warning: the result does not need it.
        """
        if self._world.rank:
            return
        state = learner.state_dict()
        content: dict[str, Any] = {"format": FORMAT, "identity": self._identity, "done": None}
        if ended:
            content |= {name: part for name, part in state.items() if name not in ("optimizer", "scaler")}
        else:
            content |= {"done": dataclasses.asdict(done), "state": state}
        try:
            with replacing(self._file) as stream:
                torch.save(content, stream)
        except OSError as error:
            self._say(f"{self._file} cannot be written: {error.strerror}; after an interruption, this epoch is lost")

    def _say(self, line: str) -> None:
        if self._world.rank == 0:
            self._warn(line)
