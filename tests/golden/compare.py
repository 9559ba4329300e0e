"""The largest relative difference between nested numbers and digests of ours and of a golden."""

from collections.abc import Iterator
from typing import Any

import pytest

# What assert_close found since somebody cleared it: tests/golden/table.py reads it.
found: list[tuple[float, str]] = []

# Goldens below this are zero in exact arithmetic; what is there is rounding.
_ZERO = 1e-9


def assert_close(mine: Any, golden: Any, tolerance: float = 1e-6) -> None:
    """Fails unless every number of `mine` is in `golden`, equal to `tolerance` relative to its size.

    Digests count relative to their tensor: norm and projections to its norm, values to its largest one.
    """
    error, where = worst(mine, golden)
    print(f"largest relative error {error:.2e} at {where}")
    found.append((error, where))
    assert error <= tolerance, f"{where}: relative error {error:.3g}"


def worst(mine: Any, golden: Any) -> tuple[float, str]:
    """(largest relative difference, where)."""
    differences = list(_differences(mine, golden, ""))
    if not differences:
        pytest.fail("nothing was compared")
    # NaN compares as neither larger nor smaller; here it is the worst of all.
    return max(differences, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])


def _differences(mine: Any, golden: Any, path: str) -> Iterator[tuple[float, str]]:
    if isinstance(mine, dict):
        if "proj" in mine:
            yield from _digest_differences(mine, golden, path)
            return
        for key, value in mine.items():
            assert key in golden, f"{path}/{key} is not in the golden"
            yield from _differences(value, golden[key], f"{path}/{key}")
    elif isinstance(mine, list):
        assert len(mine) == len(golden), f"{path}: {len(mine)} values, golden {len(golden)}"
        if mine and isinstance(mine[0], float):
            scale = max(max(abs(value) for value in golden), 1e-6)
            yield from ((abs(a - b) / scale, path) for a, b in zip(mine, golden, strict=True))
        else:
            for index, (a, b) in enumerate(zip(mine, golden, strict=True)):
                yield from _differences(a, b, f"{path}/{index}")
    elif isinstance(mine, float):
        yield (abs(mine - golden) / abs(golden) if abs(golden) > _ZERO else 0.0 if abs(mine) < 1e-6 else 1.0), path
    else:
        yield (0.0 if mine == golden else float("inf")), f"{path} ({mine!r}, golden {golden!r})"


def _digest_differences(mine: dict[str, Any], golden: dict[str, Any], path: str) -> Iterator[tuple[float, str]]:
    assert mine["shape"] == golden["shape"], f"{path}: shape {mine['shape']}, golden {golden['shape']}"
    if golden["norm"] < _ZERO:
        yield (0.0 if mine["norm"] < 1e-6 else 1.0), f"{path} should be zero"
        return
    yield abs(mine["norm"] - golden["norm"]) / golden["norm"], f"{path}/norm"
    for key, scale in (("proj", golden["norm"]), ("first", golden["absmax"]), ("last", golden["absmax"])):
        yield from ((abs(a - b) / scale, f"{path}/{key}") for a, b in zip(mine[key], golden[key], strict=True))
