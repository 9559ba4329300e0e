"""What the loader benchmark compares: something that gives batches without end, and what it was set to."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


class Source(Protocol):
    """Batches of one way to load images."""

    @property
    def in_flight(self) -> int:
        """Batches at most that it has ready or in work before they are asked for."""
        ...

    @property
    def burst(self) -> int:
        """Batches that become ready at about the same time: one for a pipeline, one a worker for a DataLoader."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """All that its speed depends on, JSON-ready."""
        ...

    def batches(self) -> Iterator[int]:
        """Without end: gets a batch onto the device and yields its number of images."""
        ...

    def close(self) -> None:
        """End its threads and processes."""
        ...


@dataclass
class Contender:
    """A source with its name and place in the tables, and its batches under way."""

    group: str
    name: str
    source: Source
    stream: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self.stream = self.source.batches()
