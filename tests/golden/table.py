"""How close every golden is met: `python -m tests.golden.table` runs their tests and writes the table in README.md."""

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision

from tests.golden import compare
from tests.golden.cases import load

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"
TESTS = (
    "tests/model",
    "tests/dali_pipes/test_augmentation_golden.py",
    "tests/evaluation/test_linear.py",
    "tests/trainer/test_config.py",
)
FILES = sorted(file.stem for file in FOLDER.glob("*.json"))

# Goldens that are no numbers to be near to: how their tests compare.
EXACT = {
    "augment": "blur within a grey level, the rest equal; crops within the standard errors of 20,000 draws",
    "checkpoint_structure": "names, shapes, types and order are equal",
    "cli": "defaults and names are equal, of the flags that exist here",
    "init_stats": "mean, deviation, kurtosis and bounds within the standard errors of one seed",
}
# Parameters of tests that choose a part of such a file.
CHOOSERS = {"augmentation": "augment", "tag": "checkpoint_structure", "flag": "cli", "fresh": "init_stats"}


def cases(name: str) -> list[Any]:
    """The cases of a file, a test each; a file of several kinds has theirs, one after the other."""
    data = load(name)
    if name in EXACT or isinstance(data, list):
        return list(data)
    return [case for kind in data.values() for case in (kind if isinstance(kind, list) else [kind])]


class Measurements:
    """A pytest plugin that runs the tests of goldens alone and keeps what each found."""

    def __init__(self) -> None:
        self.errors: dict[str, list[tuple[float, str]]] = {name: [] for name in FILES}
        self.tests = dict.fromkeys(FILES, 0)
        self.met: dict[str, set[int]] = {name: set() for name in FILES}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that take a golden."""
        items[:] = [item for item in items if self._source(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Keep the largest error of each comparison that a test made."""
        compare.found.clear()
        yield
        name, case = self._source(item)
        self.tests[name] += 1
        self.met[name].add(id(case))
        self.errors[name] += compare.found

    def _source(self, item: pytest.Item) -> Any:
        """(file, case) of the golden that a test takes; None if it takes none."""
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        golden = chosen.get("golden")
        for name in FILES:
            if golden is not None and any(golden is case for case in cases(name)):
                return name, golden
        for parameter, name in CHOOSERS.items():
            if parameter in chosen and any(chosen[parameter] in part for part in (load(name), *_parts(name))):
                return name, chosen[parameter]
        return None


def _parts(name: str) -> list[Any]:
    return list(load(name).values()) if name == "cli" else []


def table(found: Measurements) -> str:
    """The rows, and what they were found with."""
    lines = ["| golden | cases | tests | largest relative error, float64 | where |", "|---|---|---|---|---|"]
    for name in FILES:
        tests = found.tests[name]
        if name in EXACT:
            lines.append(f"| `{name}.json` | {len(cases(name))} | {tests} | {EXACT[name]} | |")
            continue
        missed = len(cases(name)) - len(found.met[name])
        error, where = max(found.errors[name])
        met = f"{len(cases(name))}" + (f", {missed} without a test" if missed else "")
        lines.append(f"| `{name}.json` | {met} | {tests} | {error:.1e} | {where.lstrip('/')} |")
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    return "\n".join([*lines, "", f"Found on the CPU with {versions}.", ""])


def main() -> int:
    """Run the tests, slow ones too; write the table if all passed. Returns pytest's exit code."""
    found = Measurements()
    code = int(pytest.main(["-p", "no:cacheprovider", *TESTS], plugins=[found]))
    if code:
        return code
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table(found) + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
