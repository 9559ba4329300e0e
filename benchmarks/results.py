"""The JSON that a benchmark writes: what was measured, on what, how, and every single repeat."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.measure import Estimate, estimate
from dali_pipes.replacing import write_atomically

SCHEMA = 1
Better = Literal["higher", "lower", "neither"]
# What the pages, comparisons and predictions read of every result.
FACTS = ("hardware", "device", "cpu", "cores", "gpu", "driver", "cuda", "versions", "commit", "dirty", "busy_cores")
CONFIGURED = ("data", "files")
MEASURED = ("matmul", "gflop_per_image")  # in the configuration, but no choice


class ResultError(ValueError):
    """A result file that cannot be used: one line that names it and says why."""


@dataclass(frozen=True)
class Measurement:
    """One quantity of one thing, a value a repeat. `group` is the table it belongs to, `name` its row."""

    group: str
    name: str
    quantity: str  # the column, with the unit: "images/s", "CPU-ms/image"
    values: tuple[float, ...]
    better: Better
    headline: bool = False  # belongs into the README's table
    detail: bool = False  # in the JSON for comparisons; the tables leave it out

    @property
    def estimate(self) -> Estimate:
        """Median and interval of the repeats."""
        return estimate(self.values)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same measurement in another file."""
        return self.group, self.name, self.quantity


@dataclass(frozen=True)
class Result:
    """One run of one benchmark."""

    benchmark: str  # "loader", "step", "ablation"
    subject: str  # what of: an architecture, or ""
    created: str  # UTC, ISO 8601
    environment: dict[str, Any]
    configuration: dict[str, Any]
    warm_up: str
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)  # of each row, where rows differ: workers, threads …
    gpu: dict[str, Any] = field(default_factory=dict)

    @property
    def quick(self) -> bool:
        """Whether it is a short form, which says that things work and little about their speed."""
        return bool(self.configuration.get("quick"))

    @property
    def stem(self) -> str:
        """Name of its files, if they are the first of this benchmark on this hardware."""
        parts = [self.benchmark, self.subject, self.environment["hardware"], "quick" if self.quick else ""]
        return "-".join(re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_") for part in parts if part)

    @property
    def choices(self) -> dict[str, Any]:
        """Of the configuration, what was chosen: two runs of the same choices are repeats of each other."""
        return {key: value for key, value in self.configuration.items() if key not in MEASURED}

    @property
    def setting(self) -> str:
        """What was chosen that speed depends on most, in short: batch, pixels, precision, compiler, threads."""
        said = []
        for words, names in {
            "batch {}": ("batch_size", "batch"),
            "{} px": ("image_size", "size"),
            "amp {}": ("amp",),
            "compile {}": ("compile",),
            "{} threads": ("workers", "threads"),
        }.items():
            said += [words.format(self.configuration[name]) for name in names if self.configuration.get(name)][:1]
        return ", ".join(said)

    def groups(self) -> list[str]:
        """The tables, in order of appearance."""
        return list(dict.fromkeys(m.group for m in self.measurements if not m.detail))

    def of(self, group: str) -> list[Measurement]:
        """The measurements of one table."""
        return [m for m in self.measurements if m.group == group]

    def find(self, group: str, name: str, quantity: str) -> Measurement:
        """One measurement; KeyError if there is none."""
        for m in self.measurements:
            if m.key == (group, name, quantity):
                return m
        raise KeyError(f"{self.benchmark} has no {quantity} of {name} in {group}")


def write(result: Result, folder: Path) -> Path:
    """Write the result in one move; returns the file: `folder`/<stem>.json, or with more to its name if that holds a
    run of other choices. A run of the same choices is replaced; its picture goes with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"schema": SCHEMA, **asdict(result)}
    for row, m in zip(record["measurements"], result.measurements, strict=True):
        row["estimate"] = asdict(m.estimate)
    file = _file(result, folder)
    write_atomically(file, (json.dumps(_with_words(record), indent=1, allow_nan=False) + "\n").encode())
    file.with_suffix(".png").unlink(missing_ok=True)
    return file


def _file(result: Result, folder: Path) -> Path:
    choices = json.dumps(result.choices, sort_keys=True)
    usual = folder / f"{result.stem}.json"
    special = folder / f"{result.stem}-{hashlib.sha256(choices.encode()).hexdigest()[:6]}.json"
    if special.exists():
        return special
    try:
        other = read(usual)
    except ResultError:  # none, or none that anybody can use
        return usual
    here = json.loads(choices)  # as it would be read
    # Choices that an older version did not write down are none to differ in.
    return usual if all(here[key] == other.choices[key] for key in here.keys() & other.choices.keys()) else special


def _with_words(value: Any) -> Any:
    """The same with "nan" and "inf" for numbers that JSON does not have; float() reads them."""
    if isinstance(value, dict):
        return {key: _with_words(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_words(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(file: Path) -> Result:
    """Read what `write` wrote.

    Raises:
        ResultError: no such file, no result of a benchmark, or one of another schema.
    """
    try:
        record = json.loads(file.read_text())
        schema = record.pop("schema")
    except OSError as error:
        raise ResultError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ResultError(f"{file} is not the result of a benchmark") from None
    if schema != SCHEMA:
        raise ResultError(f"{file} has schema {schema}, this code reads {SCHEMA}; run the benchmark again")
    try:
        rows = [{key: value for key, value in row.items() if key != "estimate"} for row in record.pop("measurements")]
        measurements = tuple(Measurement(**{**row, "values": tuple(map(float, row["values"]))}) for row in rows)
        notes = tuple(record.pop("notes"))
        result = Result(**record, measurements=measurements, notes=notes)
        lacking = [key for key in FACTS if key not in result.environment]
        lacking += [key for key in CONFIGURED if key not in result.configuration]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{file} is not a whole result: {error}") from None
    if lacking:
        raise ResultError(f"{file} is not a whole result: it does not say {', '.join(lacking)}")
    for m in measurements:
        if not m.values or m.better not in get_args(Better):
            raise ResultError(f"{file} is not a whole result: {m.quantity} of {m.name} has no values, or no direction")
    return result
