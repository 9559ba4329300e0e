"""Whatever bytes are in the files that a run reads, whatever words on its command line: the clear error or nothing."""

import contextlib
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dali_pipes import DatasetError, DatasetIndex
from trainer import checkpoint
from trainer.config import ConfigError, parse
from trainer.judgement import read_summary
from trainer.metrics import read_metrics
from trainer.run_folder import RunFolder

CASES = pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])

words = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)


def fuzz(cases, strategy, check):
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case):
        check(case)

    run()


def mutations(whole):
    """`whole` with some bytes changed, taken out, or put in, or cut off."""
    place = st.integers(0, len(whole) - 1)
    edit = st.tuples(st.sampled_from(["change", "cut", "insert", "end"]), place, st.binary(min_size=1, max_size=8))

    def apply(edits):
        content = bytearray(whole)
        for kind, at, new in edits:
            if kind == "end":
                del content[at:]
            else:
                content[at : at + (0 if kind == "insert" else len(new))] = b"" if kind == "cut" else new
        return bytes(content)

    return st.lists(edit, min_size=1, max_size=4).map(apply)


def loads_or_refuses(load, file, error, content):
    """Both are right; what is loaded must be usable, and what is refused must be named in one line."""
    file.write_bytes(content)
    try:
        return load(file)
    except error as refused:
        line = str(refused)
    assert str(file) in line
    assert "\n" not in line
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an index and a checkpoint as they are written."""
    folder = tmp_path_factory.mktemp("fuzz")
    columns = {"labels": np.array([0, 1, 1]), "widths": np.full(3, 9, np.int32), "heights": np.full(3, 7, np.int32)}
    columns["file_sizes"] = np.full(3, 99)
    DatasetIndex(folder, ["a/1.jpg", "b/2.jpg", "b/3.jpg"], **columns, classes=("a", "b"), rejected=[]).save(
        folder / "index.npz"
    )
    state: dict[str, dict[str, int]] = {name: {} for name in ("flags", "notes", "optimizer", "scaler", "loader")}
    weights = {"weight": torch.arange(6.0).view(2, 3)}
    checkpoint.save(folder, {"step": 1, "fingerprint": "0", "seconds": 0.0, **state, "model": weights}, keep=0)
    return folder


@CASES
def test_index_of_changed_bytes(saved, tmp_path, cases):
    def check(content):
        index = loads_or_refuses(DatasetIndex.load, tmp_path / "index.npz", DatasetError, content)
        if index is not None:
            assert len(index.paths) == len(index.labels) == len(index.widths) == len(index.heights) > 0
            assert len(index.fingerprint) == 32

    fuzz(cases, mutations((saved / "index.npz").read_bytes()), check)


@CASES
def test_index_of_lying_columns(tmp_path, cases):
    header = st.fixed_dictionaries(
        {
            "descr": st.sampled_from(["|u1", "<i8", "<i4", "<f8", "|O", "<U9", "nonsense"]),
            "fortran_order": st.booleans(),
            "shape": st.lists(st.integers(-1, 1 << 50) | st.integers(0, 9), max_size=2).map(tuple),
        }
    )
    names = ("names", "labels", "widths", "heights", "file_sizes", "text")
    texts = st.fixed_dictionaries({"tree": words, "classes": anything, "rejected": anything, "outside": anything})
    column = st.tuples(header, st.binary(max_size=32) | (texts | anything).map(lambda text: json.dumps(text).encode()))

    def check(columns):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for name, (head, data) in columns.items():
                line = repr(head).encode()
                archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + len(line).to_bytes(2, "little") + line + data)
        loads_or_refuses(DatasetIndex.load, tmp_path / "index.npz", DatasetError, content.getvalue())

    fuzz(cases, st.fixed_dictionaries(dict.fromkeys(names, column)), check)


@CASES
def test_checkpoint_of_changed_bytes(saved, tmp_path, cases):
    whole = (saved / "checkpoint_00000001.pt").read_bytes()

    def check(content):
        state = loads_or_refuses(checkpoint.load, tmp_path / "checkpoint.pt", ConfigError, content)
        assert state is None or content == whole

    fuzz(cases, mutations(whole), check)


@CASES
def test_checkpoint_of_changed_bytes_with_a_right_checksum(saved, tmp_path, cases):
    """What reaches the unpickler."""
    whole = (saved / "checkpoint_00000001.pt").read_bytes()

    def check(content):
        file = tmp_path / "checkpoint.pt"
        file.write_bytes(content[: -checkpoint._SEAL_SIZE])
        with open(file, "r+b") as stream:
            checkpoint._seal(stream)
        loads_or_refuses(checkpoint.load, file, ConfigError, file.read_bytes())

    fuzz(cases, mutations(whole).filter(lambda content: len(content) > 200), check)


@CASES
def test_run_folder_of_anything(tmp_path, cases):
    flags = json.dumps({"flags": {"arch": "vit_small", "lr": 0.1}, "fingerprint": "0"}).encode()
    contents = anything.map(lambda value: json.dumps(value).encode()) | mutations(flags) | st.binary(max_size=20)

    def check(content):
        for name in ("config.json", "metrics.jsonl", "summary.json"):
            (tmp_path / name).write_bytes(content)
        with contextlib.suppress(ConfigError):
            assert "flags" in (RunFolder(tmp_path).recorded() or {})
        assert all(isinstance(row["step"], int) for row in read_metrics(tmp_path))
        summary = read_summary(tmp_path)
        assert summary is None or isinstance(summary["steps"], int)

    fuzz(cases, contents, check)


@CASES
def test_command_line_of_anything(cases, capsys):
    known = ["--lr", "--epochs", "--save-every", "--batch-size", "--amp", "--keep", "--knn", "--timeout", "--max-steps"]
    values = words | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["", "None", "--", "=", "30min"])
    flags = st.lists(st.sampled_from(known) | values, max_size=6)

    def check(argv):
        line = ""
        code: str | int | None = None
        try:
            parse(["demo", "--data", "images", "--out", "run", *argv]).check(world_size=2)
        except ConfigError as error:
            line = str(error)
        except SystemExit as end:
            code = end.code
        assert "\n" not in line
        assert code in (None, 2) or {"-h", "--help"} & set(argv)
        capsys.readouterr()

    fuzz(cases // 4, flags, check)  # tyro builds its parser anew for each
