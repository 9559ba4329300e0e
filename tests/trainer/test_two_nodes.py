"""Two hosts, for torch two network namespaces joined by a cable that can be pulled: each side ends in time and names
the other, and the run goes on as if nothing had happened."""

import json
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from tests.trainer.conftest import ROOT, TINY, lives, rank_processes, wait_for_row
from trainer.distributed import interface_between_nodes

ADDRESSES = ("10.99.0.1", "10.99.0.2")
HOSTS = ("left", "right")
PORT = 29400
TIMEOUT = 15
FLAGS = f"--no-knn --moco-mlp-dim 384 --epochs 10 --max-steps 30 --save-every 2 --timeout {TIMEOUT}".split()


class Nodes:
    """Two hosts with a network of their own; they share the file system, as nodes of a cluster do."""

    def __init__(self):
        self.started: list[subprocess.Popen[str]] = []
        self._holders: list[subprocess.Popen[str]] = []
        for host in HOSTS:
            script = 'hostname "$0" && ip link set lo up && echo up && exec sleep infinity'
            line = ["unshare", "-nu", "sh", "-c", script, host]
            line = [*self._into(0, "-U"), *line] if self._holders else ["unshare", "-Ur", *line]
            holder = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self._holders.append(holder)
            assert holder.stdout is not None
            if holder.stdout.readline() != "up\n":
                self._skip(holder.communicate()[1])
        try:
            self._run(0, f"ip link add cable type veth peer name cable netns {self._holders[1].pid}")
            for node, address in enumerate(ADDRESSES):
                self._run(node, f"ip address add {address}/24 dev cable")
                self._run(node, "ip link set cable up")
        except subprocess.CalledProcessError as error:
            self._skip(error.stderr)

    def start(self, node, *flags):
        """torchrun of one rank on this node."""
        rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={ADDRESSES[0]}:{PORT} --rdzv-id=job --nnodes=2"
        host = f"--rdzv-conf=is_host={node == 0} --local-addr={ADDRESSES[node]}"  # nobody resolves the hosts' names
        torchrun = f"{rendezvous} {host} --nproc-per-node=1"
        line = [*self._into(node), sys.executable, "-m", "torch.distributed.run"]
        process = subprocess.Popen(
            [*line, *torchrun.split(), str(ROOT / "train_ddp.py"), *TINY, *FLAGS, *map(str, flags)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def pull_cable(self):
        self._run(1, "ip link set cable down")

    def plug_in(self):
        self._run(1, "ip link set cable up")

    def close(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for holder in self._holders:
            holder.kill()
            holder.communicate()

    def _skip(self, reason):
        self.close()
        pytest.skip(f"this system lets nobody make a network of their own: {reason.strip()}")

    def _into(self, node, *namespaces):
        namespaces = namespaces or ("-U", "-n", "-u")
        return ["nsenter", "-t", str(self._holders[node].pid), *namespaces, "--preserve-credentials"]

    def _run(self, node, line):
        subprocess.run([*self._into(node), *line.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    made = Nodes()
    yield made
    made.close()


def test_a_node_that_knows_its_own_name_as_loopback_only_asks_another_for_its_address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "unconnected"), (2, "lo")])
    store = dist.HashStore()
    assert interface_between_nodes(1, store) == "lo"
    assert store.get("moco_v3/address").startswith(b"127.")
    assert interface_between_nodes(0, store) == "lo"
    store.set("moco_v3/address", "")  # a node without a way to node 0
    assert interface_between_nodes(0, store) is None


@pytest.mark.slow
def test_a_node_that_is_cut_off_is_named_by_both_sides_and_the_run_goes_on(nodes, start, losses, sample, tmp_path):
    whole = start(*FLAGS, "--data", sample, "--out", tmp_path / "whole", ranks=2)
    assert whole.wait(300) == 0, whole.communicate()[1]
    flags = ["--data", sample, "--out", tmp_path / "run"]
    left, right = nodes.start(0, *flags), nodes.start(1, *flags)
    wait_for_row(tmp_path / "run" / "metrics.jsonl", left, 5)
    (far,) = rank_processes(right)
    nodes.pull_cable()
    assert left.wait(3 * TIMEOUT) == 1
    deadline = time.monotonic() + 3 * TIMEOUT
    while lives(far):
        assert time.monotonic() < deadline, "the rank that is cut off does not end"
        time.sleep(0.2)
    right.kill()  # as a scheduler would: torchrun itself waits for its peer's store, for as long as TCP does
    printed = [side.communicate()[1] for side in (left, right)]
    (lost,), (cut_off,) = ([line for line in text.splitlines() if "train_ddp.py: error" in line] for text in printed)
    assert "no sign of life from rank 1 (node 1: right, pid" in lost
    assert "this node is cut off from rank 0 (node 0: left, pid" in cut_off
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    nodes.plug_in()
    again = [nodes.start(node, *flags) for node in (0, 1)]
    for side in again:
        assert side.wait(120) == 0, side.communicate()[1]
    assert list(losses()) == list(range(1, 31))
    assert losses() == losses("whole")
