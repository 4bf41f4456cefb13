"""A real SLURM on this machine for tests: munged, slurmctld and two slurmd with pretended GPUs, in one folder.

Free ports and a folder of its own, so that it disturbs no other SLURM; what a killed test run left
running is found by the configuration in its environment and ended at the next start.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from ports import kept_port

PREFIX = "piflow_slurm_"
PACKAGES = ("slurm-wlm", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
PATIENCE = 600.0
"""Seconds for anything that has to happen; nothing is measured."""


class Unavailable(RuntimeError):
    """SLURM cannot be had on this machine; the message says why."""


def find_program(name: str) -> str | None:
    """Debian keeps daemons in /usr/sbin, which users often do not have in PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def install() -> None:
    """Install what is missing with apt. Raises Unavailable where that cannot be done."""
    missing = [name for name in DAEMONS if find_program(name) is None]
    if missing and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        raise Unavailable(
            f"{', '.join(missing)} not found, and apt-get or root to install {' '.join(PACKAGES)} neither."
        )
    if os.geteuid() != 0:
        raise Unavailable("slurmd runs jobs as their users, which takes root.")
    if not missing:
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *command], env=quiet, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise Unavailable(f"apt-get {' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def processes_of(folder: Path) -> Iterator[int]:
    """Processes, daemons' and jobs', whose environment names the cluster in `folder`."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:
            continue


def is_daemon(pid: int) -> bool:
    """Also of the helpers that daemons start."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("munged", "slurmctld", "slurmd", "slurmscriptd")
    except OSError:
        return True


def end_processes(folder: Path) -> None:
    """Kill what is left of a cluster, daemons first, since they would start more."""
    deadline = time.monotonic() + PATIENCE
    while pids := [pid for pid in processes_of(folder) if pid != os.getpid()]:
        assert time.monotonic() < deadline, f"processes {pids} of {folder} do not end"
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def sweep() -> None:
    """End clusters of test runs that were killed: their folder names a process that is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = folder / "owner"
        if owner.exists() and not Path(f"/proc/{owner.read_text().strip()}").exists():
            end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)


class LocalCluster:
    """Two nodes n1 and n2, whose names do not resolve, of 2 CPUs and 4 pretended GPUs each."""

    def __init__(self):
        sweep()
        # Not below pytest's folder, which only its owner may enter: munge refuses a socket there.
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.folder.chmod(0o755)
        (self.folder / "owner").write_text(f"{os.getpid()}\n")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))},
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        self.ports = ExitStack()

    def start(self) -> None:
        """Daemons up and both nodes idle. Raises Unavailable where they do not come up."""
        self._write_configuration()
        munge = self.folder / "munge"
        self._daemon(
            "munged",
            *("--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key"),
            *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log"),
        )
        self.wait_until(lambda: (munge / "socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_until(lambda: self.node_states() == ["idle"] * len(NODES), "idle nodes")

    def _write_configuration(self) -> None:
        """All files before any daemon: a node that once registered with fewer GPUs stays drained."""
        for name in ("state", "spool", "log", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        controller, *nodes = (self.ports.enter_context(kept_port()) for _ in range(1 + len(NODES)))
        host = socket.gethostname().split(".")[0]
        names, ports = ",".join(NODES), ",".join(map(str, nodes))
        # Any four devices will do; nothing opens them.
        devices = "".join(
            f"NodeName={names} Name=gpu File=/dev/{name}\n" for name in ("null", "zero", "full", "random")
        )
        (self.folder / "gres.conf").write_text(devices)
        (self.folder / "slurm.conf").write_text(f"""ClusterName=piflow
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld
SlurmdLogFile={self.folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
KillWait=20
JobRequeue=1
OverTimeLimit=30
GresTypes=gpu
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=2 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
PartitionName=test Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
""")

    def _daemon(self, name: str, *arguments: str, key: str | None = None) -> None:
        program = find_program(name)
        assert program is not None, name
        configuration = () if name == "munged" else ("-f", f"{self.folder}/slurm.conf")
        with open(self.folder / "log" / f"{key or name}.out", "a") as output:
            self.daemons[key or name] = subprocess.Popen(
                [program, *configuration, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, key=node)

    def kill_node(self, node: str) -> None:
        """The node's daemon dies; what it started is left alone, as a lost network would leave it."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def node_states(self) -> list[str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.environment, capture_output=True, text=True
        )
        return done.stdout.split()

    def stop(self) -> None:
        """End daemons and everything they started."""
        end_processes(self.folder)
        for daemon in self.daemons.values():
            daemon.wait()
        self.ports.close()
        shutil.rmtree(self.folder)

    def wait_until(self, reached: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while not reached():
            for name, daemon in self.daemons.items():
                assert daemon.poll() in (None, -signal.SIGKILL), f"{name} ended: {self.logs()}"
            assert time.monotonic() < deadline, f"no {what} within {patience:g} s: {self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs, for failures."""
        files = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in files)

    # Jobs

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """A user's command on this cluster; stdout holds stderr too."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done

    def job(self, job: str) -> dict[str, str]:
        """The fields of scontrol show job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).stdout.split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%A").stdout.split()

    def wait_for_state(self, job: str, *states: str) -> dict[str, str]:
        self.wait_until(lambda: self.job(job)["JobState"] in states, f"job {job} in {states}")
        return self.job(job)

    def start_now(self, job: str) -> None:
        """A requeued job waits for two minutes by itself. In the second of its requeue it cannot start: "credential revoked"."""
        self.wait_for_state(job, "PENDING")
        self.wait_until(lambda: not self.job_processes(), f"end of the last attempt of job {job}")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def job_processes(self) -> list[int]:
        """What runs here beside the daemons: steps, scripts and tasks."""
        daemons = {daemon.pid for daemon in self.daemons.values()}
        return [pid for pid in processes_of(self.folder) if pid not in daemons and not is_daemon(pid)]
