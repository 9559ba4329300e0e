"""How many cores a process may use: its affinity's, or a container's share of them."""

import os

import pytest

from dali_pipes import cores


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A function that lays out control groups: what /proc/self/cgroup says, and the files below /sys/fs/cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "FILESYSTEM", tmp_path / "fs")

    def lay_out(own, **files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            file = tmp_path / "fs" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return lay_out


@pytest.mark.parametrize(
    ("limit", "usable"),
    [
        ("max 100000\n", 64),
        ("400000 100000\n", 4),
        ("350000 100000\n", 4),
        ("20000 100000\n", 1),
        ("9900000 100000\n", 64),
        ("400000 0\n", 64),
        ("\n", 64),
    ],
)
def test_a_container_has_its_quota_of_the_machines_cores(limit, usable, groups):
    groups("0::/\n", cpu_max=limit)
    assert cores.usable_cores() == usable


def test_the_least_quota_of_the_groups_one_lies_in_counts(groups):
    groups("0::/pods/one/job\n", pods__cpu_max="300000 100000\n", pods__one__cpu_max="800000 100000\n")
    assert cores.usable_cores() == 3


def test_a_group_is_found_at_the_top_where_its_path_is_one_outside_of_the_container(groups):
    groups("0::/../../elsewhere\n", cpu_max="500000 100000\n")
    assert cores.usable_cores() == 5


@pytest.mark.parametrize(("quota", "usable"), [("600000\n", 6), ("-1\n", 64)])
@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
def test_quotas_of_version_1(quota, usable, mounted, groups):
    own = "5:memory:/docker/other\n4:cpu,cpuacct:/docker/x\n3:cpuset:/docker/x\n0::/\n"
    numbers = {"cpu_cfs_quota_us": quota, "cpu_cfs_period_us": "100000\n"}
    others = {"cpu_cfs_quota_us": "100000\n", "cpu_cfs_period_us": "100000\n"}  # where only another controller is
    files = {f"{mounted}__{name}": number for name, number in numbers.items()}
    groups(own, **files, **{f"{mounted}__docker__other__{name}": number for name, number in others.items()})
    assert cores.usable_cores() == usable


def test_what_cannot_be_understood_is_no_quota(groups, tmp_path):
    groups("nonsense\n0::/a\n", cpu_max="many 100000\n")
    (tmp_path / "own").write_bytes(b"0::/\xff\xfe\n")
    assert cores.usable_cores() == 64


def test_without_control_groups_the_affinity_counts(groups):
    assert cores.usable_cores() == 64
