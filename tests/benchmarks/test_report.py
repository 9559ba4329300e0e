"""Pages and the README's table, from results whose numbers are known."""

from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from benchmarks import report, results
from benchmarks.results import Measurement

README = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nEnd.\n"


@pytest.fixture
def folder(tmp_path, result):
    """results/ with a loader's JSON and PNG, and a README with a place for the table."""
    file = results.write(result(), tmp_path / "results")
    Figure(figsize=(1, 1)).savefig(file.with_suffix(".png"))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def write(folder):
    paths = {"results": folder / "results", "out": folder / "out", "readme": folder / "README.md"}
    return report.main([part for flag, path in paths.items() for part in (f"--{flag}", str(path))])


def test_the_page_holds_every_number_and_refers_to_the_plot(folder):
    assert write(folder) == 0
    page = (folder / "out" / "REPORT.md").read_text()
    assert "## loader on Some CPU, 2 cores" in page
    assert "| ours | 103 (100 to 106) | 5.00 (4.50 to 5.50) |" in page
    assert "| theirs <&\\|> | 50.0 |  |" in page
    assert "](../results/loader-cpu_2_cores.png)" in page
    assert "0123456789" in page
    assert "torch 2.9.0" in page
    assert "Intervals hold: 60% with 3 rounds, 93% with 7 rounds." in page
    assert "16 threads. Some CPU, 2 cores." in page
    assert "no GPU readings: the benchmark ran on the CPU" in page


def test_what_no_gpu_has_measured_says_so(folder, result):
    write(folder)
    for page in ("REPORT.md", "REPORT.html"):
        text = (folder / "out" / page).read_text()
        for arch in ("vit_small", "vit_base", "resnet50"):
            assert f"variants of {arch} on a GPU" in text
    assert "| + channels_last | not yet measured | not yet measured |" in (folder / "out" / "REPORT.md").read_text()
    gpu = result().environment | {"gpu": {"name": "H200"}, "hardware": "h200"}
    rows = (Measurement("vit_base", "reference-style step", "images/s", (700.0, 710.0), "higher"),)
    results.write(replace(result(), benchmark="variants", environment=gpu, measurements=rows), folder / "results")
    write(folder)
    text = (folder / "out" / "REPORT.md").read_text()
    assert "variants of vit_base on a GPU" not in text
    assert "variants of vit_small on a GPU" in text
    assert "| reference-style step | 700 (700 to 710) |" in text


def test_the_html_needs_no_other_file(folder):
    write(folder)
    page = (folder / "out" / "REPORT.html").read_text()
    assert 'src="data:image/png;base64,' in page
    assert "theirs &lt;&amp;|&gt;" in page
    assert "<tags>" not in page
    assert "http" not in page.split("<body>")[1]


def test_the_readme_changes_between_the_markers_only(folder):
    write(folder)
    once = (folder / "README.md").read_text()
    assert once.startswith(f"# Title\n\n{report.BEGIN}\n| what |")
    assert once.endswith(f"{report.END}\n\nEnd.\n")
    assert "| loader: ours | 103 (100 to 106) images/s | 16 threads | Some CPU, 2 cores | 0123456789 |" in once
    assert "theirs" not in once  # no headline
    write(folder)
    assert (folder / "README.md").read_text() == once


def test_quick_forms_stay_out_of_the_readme(folder, result):
    (folder / "results" / "loader-cpu_2_cores.json").unlink()
    results.write(result(quick=True), folder / "results")
    write(folder)
    assert f"{report.BEGIN}\nNot yet measured.\n{report.END}" in (folder / "README.md").read_text()
    assert "quick form" in (folder / "out" / "REPORT.md").read_text()


def test_without_a_place_in_the_readme_nothing_is_written(folder, capsys):
    (folder / "README.md").write_text("# Title\n")
    assert write(folder) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "out").exists()


def test_no_results_is_one_line(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_compare_tells_the_change_and_what_is_not_alike(folder, result, capsys):
    old = folder / "results" / "loader-cpu_2_cores.json"
    new = results.write(result(rate=150.0, quick=True), folder / "other")
    assert report.main(["--compare", str(old), str(new)]) == 0
    printed = capsys.readouterr().out
    assert "not alike: quick: False and True" in printed
    assert "commit 0123456789; new: " in printed
    line = next(line for line in printed.splitlines() if "images/s" in line)
    assert "1.500" in line
    assert line.rstrip().endswith("better")


def test_compare_names_the_file_that_is_none(folder, capsys):
    old = folder / "results" / "loader-cpu_2_cores.json"
    assert report.main(["--compare", str(old), str(folder / "README.md")]) == 2
    assert "README.md is not the result of a benchmark" in capsys.readouterr().err
