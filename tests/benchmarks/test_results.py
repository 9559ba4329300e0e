"""The JSON files: what is written is what is read, and what cannot be read says why."""

import json

import pytest

from benchmarks import results
from benchmarks.results import ResultError


def test_a_result_survives_its_file(result, tmp_path):
    written = result()
    file = results.write(written, tmp_path / "new")
    assert file.name == "loader-cpu_2_cores.json"
    assert results.read(file) == written
    assert not list(file.parent.glob("*.part"))


def test_the_file_tells_median_and_interval_to_other_readers(result, tmp_path):
    record = json.loads(results.write(result(), tmp_path).read_text())
    assert record["schema"] == results.SCHEMA
    first = record["measurements"][0]
    assert first["values"] == [100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0]
    assert first["estimate"] == {
        "median": 103.0,
        "low": 100.0,
        "high": 106.0,
        "coverage": pytest.approx(0.930, abs=1e-3),
        "repeats": 7,
    }


def test_a_quick_form_never_replaces_the_default_form(result):
    assert result(quick=True).stem != result().stem


def test_measurements_are_found_by_place(result):
    assert result().find("loader", "ours", "images/s").estimate.median == 103.0
    with pytest.raises(KeyError, match="no watts of ours"):
        result().find("loader", "ours", "watts")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not the result"),
        ("[]", "is not the result"),
        ('{"a": 1}', "is not the result"),
        ('{"schema": 99}', "has schema 99"),
        ('{"schema": 1, "measurements": [], "notes": []}', "is not a whole result"),
    ],
)
def test_what_is_no_result_is_refused_with_its_name(text, reason, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ResultError, match=reason) as error:
        results.read(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ResultError, match="nowhere"):
        results.read(tmp_path / "nowhere.json")
