"""Ranks and addresses as torchrun and SLURM tell them."""

import socket

import pytest

from piflow_dist.parallel import environment as module
from piflow_dist.parallel.environment import (
    default_threads,
    find_place,
    first_node,
    interface_towards,
    node_address,
    set_environment,
)

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "4711",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only addresses resolve, and SLURM's commands are not there."""

    def numeric_only(host: str, *arguments: object, **options: object) -> list:
        try:
            socket.inet_aton(host)
        except OSError as error:
            raise socket.gaierror(-2, "Name or service not known") from error
        return real(host, *arguments, **options)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", numeric_only)
    monkeypatch.setattr(module, "slurm_node_address", lambda node: None)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-010,12]-ib,login", "gpu003-ib"),
        ("rack[2-3]node[07,09]", "rack2node07"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_slurm_tells_rank_world_and_address() -> None:
    place = find_place(SLURM)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert place.address == "10.1.2.3" and place.nodes == 2
    assert find_place({**SLURM, "MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "7"}).address == "10.9.9.9"


def test_all_ranks_of_a_job_meet_at_one_port_and_a_requeued_job_at_another() -> None:
    ports = {find_place({**SLURM, "SLURM_PROCID": str(rank)}).port for rank in range(8)}
    again = find_place({**SLURM, "SLURM_RESTART_COUNT": "1"}).port
    other_job = find_place({**SLURM, "SLURM_JOB_ID": "4712"}).port
    assert len(ports) == 1 and len({*ports, again, other_job}) == 3
    assert all(10_000 <= port < 30_000 for port in (*ports, again, other_job))


def test_torchrun_counts_inside_a_slurm_step() -> None:
    place = find_place({**SLURM, **TORCHRUN})
    assert (place.rank, place.world_size, place.local_world_size, place.address) == (3, 4, 2, "10.0.0.1")


def test_uneven_tasks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="7 tasks on 2 nodes"):
        find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "7"})


def test_a_process_that_nobody_started_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"tools/launch\.py"):
        find_place({})


def test_a_name_that_does_not_resolve_becomes_slurms_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "slurm_node_address", lambda node: "10.5.0.7")
    assert node_address("gpu007", SLURM) == "10.5.0.7"
    monkeypatch.setattr(module, "slurm_node_address", lambda node: "another-name-without-address")
    assert node_address("gpu007", SLURM) == "10.1.2.3"
    monkeypatch.setattr(module, "slurm_node_address", lambda node: None)
    with pytest.raises(RuntimeError, match="gpu007 does not resolve.*MASTER_ADDR"):
        node_address("gpu007", {})


def test_what_the_site_has_set_stays() -> None:
    found = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO"}
    set_environment(find_place({**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}), found)
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_DEBUG"]) == ("ib0", "INFO")
    assert (found["RANK"], found["LOCAL_WORLD_SIZE"]) == ("3", "2")
    found = {}
    set_environment(find_place({**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}), found)
    assert found["GLOO_SOCKET_IFNAME"] == "lo" and "NCCL_SOCKET_IFNAME" not in found


def test_the_interface_of_an_address_nobody_knows() -> None:
    assert interface_towards("no-such-name") is None
    assert interface_towards("127.0.0.1") == "lo"


def test_threads_are_a_share_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    place = find_place(SLURM)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert default_threads(place, {"SLURM_CPUS_ON_NODE": "64"}) == 16  # not bound
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(12)))
    assert default_threads(place, {"SLURM_CPUS_ON_NODE": "64"}) == 12  # bound by SLURM
