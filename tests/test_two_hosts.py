"""Two machines, as two network namespaces with addresses of their own, of which one is cut off for a while."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import run_pretrain
import torch
from safetensors.torch import load_file
from scripts import losses, metrics
from test_faults import SMALL, photos  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow

SCRIPT = str(Path(run_pretrain.__file__))
ADDRESSES = ["10.91.7.1", "10.91.7.2"]


def ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces that are joined by a cable."""
    names = [f"mae-host-{index}" for index in range(2)]
    try:
        if any(ip("netns", "add", name).returncode for name in names):
            pytest.skip("network namespaces are not allowed here")
    except FileNotFoundError:
        pytest.skip("there is no command ip: install iproute2")
    ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        ip("netns", "delete", name)


def start(host: str, rank: int, dataset: Path, run: Path) -> subprocess.Popen[str]:
    """A machine's torchrun; the run folder is one that both see, as on a cluster."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:29411", "--rdzv_id", "mae"]
    torchrun += ["--rdzv_conf", f"is_host={int(rank == 0)}"]
    torchrun += ["--local_addr", ADDRESSES[rank], "--max_restarts", "5"]
    script = [SCRIPT, "--dataset", str(dataset), *SMALL, "--output_dir", str(run), "--process_timeout", "8"]
    script += ["--epochs", "120", "--log_every", "5", "--save_every", "10"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    words = ["ip", "netns", "exec", host, sys.executable, *torchrun, *script]
    log = (run.parent / f"{run.name}-{rank}.log").open("w")
    return subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not (run / "metrics.jsonl").exists() or not any(r["step"] >= step for r in metrics(run)):
        assert time.monotonic() < deadline, (run.parent / f"{run.name}-0.log").read_text()
        time.sleep(0.05)


def test_two_hosts__one_is_cut_off_and_the_run_goes_on(
    hosts: list[str],
    photos: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    runs = {}
    for name in ("whole", "cut"):
        processes = [start(host, rank, photos, tmp_path / name) for rank, host in enumerate(hosts)]
        if name == "cut":
            wait_for_step(tmp_path / name, 40)
            ip("-n", hosts[1], "link", "set", "cable", "down")
            time.sleep(12)  # longer than the timeout
            ip("-n", hosts[1], "link", "set", "cable", "up")
        codes = [process.wait(timeout=240) for process in processes]
        log = (tmp_path / f"{name}-0.log").read_text()
        assert codes == [0, 0], log
        runs[name] = log
    assert "2 x cpu" in runs["whole"]
    assert re.search(r"resume    from step [1-9]", runs["cut"]), runs["cut"]
    assert losses(metrics(tmp_path / "cut")) == losses(metrics(tmp_path / "whole"))
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
