"""Ranks on two hosts of their own addresses: network namespaces joined by a cable, started by srun's variables alone."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# In both namespaces the host's name resolves to a loopback address at most, as on many clusters.
RANK = textwrap.dedent("""
    import torch, torch.distributed as dist
    from piflow_dist.parallel.topology import start_process_group
    topology = start_process_group("cpu", 120)
    total = torch.tensor([float(topology.rank + 1)])
    dist.all_reduce(total)
    print(topology.rank, topology.world_size, total.item(), flush=True)
    dist.barrier()
""")


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces and their addresses."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (package iproute2)")
    names = {f"piflow{os.getpid()}{end}": f"10.77.0.{number}" for number, end in enumerate("ab", start=1)}
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            first, second = names
            ip("link", "add", "cable0", "netns", first, "type", "veth", "peer", "cable0", "netns", second)
        except RuntimeError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        for name, address in names.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable0")
            for device in ("lo", "cable0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_rank(host: str, rank: int, first_address: str) -> subprocess.Popen:
    variables = {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "unresolvable[1-2]",
        "SLURM_JOB_ID": "77",
        "SLURM_LAUNCH_NODE_IPADDR": first_address,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
    }
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-c", RANK],
        env={**{key: value for key, value in os.environ.items() if not key.startswith("SLURM")}, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_four_ranks_on_two_hosts_meet_by_address(hosts: dict[str, str]) -> None:
    """Each host sees only its own loopback: an address taken from there would reach nobody."""
    first, second = hosts
    ranks = [start_rank(host, rank, hosts[first]) for rank, host in enumerate((first, first, second, second))]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0, 0], said
    assert [text.splitlines()[-1] for text in said] == [f"{rank} 4 10.0" for rank in range(4)]
