"""A process's place among the others, told by torchrun or by SLURM, and the one place that sets what gloo and NCCL read."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

LAUNCHER_PID = "PIFLOW_LAUNCHER_PID"
"""Variable: the process that started this one, on the same machine."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    """Where rank 0 waits for the others: an IP address, or a name that resolves here."""
    port: int

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands. torchrun counts before SLURM, as it may run inside one of its steps.

    Raises RuntimeError where neither started this process.
    """
    if all(name in environment for name in TORCHRUN):
        rank, world_size, local_rank = (int(environment[name]) for name in TORCHRUN[:3])
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        return Place(
            rank, world_size, local_rank, local_world_size, environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        )
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        return slurm_place(environment)
    raise RuntimeError(
        "Neither torchrun nor srun started this process: no RANK and no SLURM_PROCID. Use tools/launch.py or slurm/*.sh."
    )


def slurm_place(environment: Mapping[str, str]) -> Place:
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
    if tasks % nodes:
        raise RuntimeError(
            f"SLURM runs {tasks} tasks on {nodes} nodes, unevenly ({environment.get('SLURM_STEP_TASKS_PER_NODE')}): "
            "a tensor-parallel group could span two nodes. Ask for --ntasks-per-node."
        )
    address = environment.get("MASTER_ADDR") or node_address(
        first_node(environment["SLURM_STEP_NODELIST"]), environment
    )
    # Below the ports that Linux gives out by itself; a requeued job tries another one.
    attempt = int(environment.get("SLURM_RESTART_COUNT", 0))
    port = 10_000 + (int(environment["SLURM_JOB_ID"]) * 7 + attempt * 101) % 20_000
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        world_size=tasks,
        local_rank=int(environment["SLURM_LOCALID"]),
        local_world_size=tasks // nodes,
        address=address,
        port=int(environment.get("MASTER_PORT", port)),
    )


def first_node(node_list: str) -> str:
    """The first name of a SLURM node list: "gpu[003-010,12]-ib,login" -> "gpu003-ib"."""
    name = re.match(r"(?:[^\[,]|\[[^\]]*\])+", node_list).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name)


def node_address(node: str, environment: Mapping[str, str]) -> str:
    """What connects to a node: its name where that resolves, else its address as SLURM knows it.

    srun's own address comes last: batch scripts run on the first node, where rank 0 is. A container without SLURM's
    commands has nothing else.
    """
    if resolves(node):
        return node
    known = slurm_node_address(node)
    if known is not None and resolves(known):
        return known
    if "SLURM_LAUNCH_NODE_IPADDR" in environment:
        return environment["SLURM_LAUNCH_NODE_IPADDR"]
    raise RuntimeError(
        f"The name of node {node} does not resolve, and SLURM tells no address. Set MASTER_ADDR to the first node's address."
    )


def resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def slurm_node_address(node: str) -> str | None:
    """NodeAddr of `scontrol show node`; None where scontrol is not there or does not answer."""
    if shutil.which("scontrol") is None:
        return None
    try:
        shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    found = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return found.group(1) if found else None


def set_environment(place: Place, environment: dict[str, str] = os.environ) -> None:
    """What torch, DeepSpeed, the data stream, gloo and NCCL read. Values that the user or the site has set stay.

    Time limits of collectives are not here: torch takes them as an argument (launch.timeout_seconds).
    """
    environment |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }
    # A collective that failed ends its process by an exception, and its NCCL communicator with it, instead of hanging on.
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    environment.setdefault("NCCL_DEBUG", "WARN")
    # Left alone, gloo binds to whatever this host's name means here, which on many clusters is a loopback address or
    # nothing, and NCCL guesses among the interfaces. The one that leads to rank 0 is right for both.
    interface = interface_towards(place.address)
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        if place.nodes > 1 and not interface.startswith("lo"):
            environment.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_towards(host: str) -> str | None:
    """Name of the network interface through which `host` is reached from here; None where that cannot be told."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == mine for address in addresses):
            return name
    return "lo" if mine.startswith("127.") else None


def default_threads(place: Place, environment: Mapping[str, str] = os.environ) -> int:
    """CPU threads of a process: the cores that SLURM has bound it to, or its share of the node's."""
    cores = len(os.sched_getaffinity(0))
    on_node = int(environment.get("SLURM_CPUS_ON_NODE", cores))
    return max(1, min(cores, on_node // place.local_world_size))
