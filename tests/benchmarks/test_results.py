"""The JSON files: what is written is what is read, and what cannot be read says why."""

import json
from dataclasses import replace
from math import inf, isnan, nan

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


def test_another_choice_does_not_replace_a_result_and_the_same_one_does(result, tmp_path):
    def at(batch, rate=100.0):
        made = result(rate=rate)
        return replace(made, configuration={**made.configuration, "batch": batch, "sizes": (1, 2)})

    first = results.write(at(256), tmp_path)
    first.with_suffix(".png").touch()
    other = results.write(at(8), tmp_path)
    assert other.name.startswith("loader-cpu_2_cores-")
    assert results.read(first).configuration["batch"] == 256
    assert first.with_suffix(".png").exists()
    assert results.write(at(8, rate=50.0), tmp_path) == other
    assert results.write(at(256, rate=50.0), tmp_path) == first
    assert not first.with_suffix(".png").exists()  # it showed the numbers before
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_what_is_measured_is_no_choice(result, tmp_path):
    made = result()
    rates = [replace(made, configuration={**made.configuration, "matmul": {"tflops": rate}}) for rate in (1.0, 2.0)]
    assert results.write(rates[0], tmp_path) == results.write(rates[1], tmp_path)


def test_a_curve_that_diverged_is_kept(result, tmp_path):
    made = result()
    gone = replace(made.measurements[1], values=(nan, inf, 1.0))
    written = replace(made, measurements=(gone,), settings={"ours": {"loss": [2.0, nan]}})
    found = results.read(results.write(written, tmp_path)).measurements[0]
    assert isnan(found.values[0])
    assert found.values[1:] == (inf, 1.0)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("environment", "gpu"), None, "does not say gpu"),
        (("configuration", "files"), None, "does not say files"),
        (("measurements", 0, "values"), [], "has no values"),
        (("measurements", 0, "values"), ["x"], "could not convert"),
        (("measurements", 0, "better"), "maybe", "no direction"),
    ],
)
def test_half_a_result_is_refused(place, value, reason, result, tmp_path):
    file = results.write(result(), tmp_path)
    record = json.loads(file.read_text())
    *path, last = place
    part = record
    for key in path:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    file.write_text(json.dumps(record))
    with pytest.raises(ResultError, match=f"is not a whole result: .*{reason}"):
        results.read(file)


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
