"""The SLURM that the other tests here use is one: two nodes whose names do not resolve, with four GPUs each."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from local_cluster import LocalCluster, processes_of

HERE = Path(__file__).parent


def test_a_step_runs_on_both_nodes_with_gpus(slurm: LocalCluster) -> None:
    shown = slurm.run(
        "srun",
        "-N2",
        "-n4",
        "--gpus-per-node=2",
        "bash",
        "-c",
        "echo $SLURMD_NODENAME:$SLURM_PROCID $CUDA_VISIBLE_DEVICES",
    )
    assert sorted(shown.stdout.splitlines()) == ["n1:0 0,1", "n1:1 0,1", "n2:2 0,1", "n2:3 0,1"]


def test_the_daemons_of_a_killed_test_run_are_ended_by_the_next(slurm: LocalCluster) -> None:
    """A test run killed while a job sleeps: the job outlives its daemons, and goes when the next cluster is made."""
    script = textwrap.dedent("""
        import sys, time
        sys.path.append("..")
        from local_cluster import LocalCluster
        cluster = LocalCluster()
        cluster.start()
        cluster.run("sbatch", "--output=/dev/null", "--wrap=sleep 600")
        cluster.wait_until(lambda: cluster.run("squeue", "--noheader", "--format=%T").stdout.split() == ["RUNNING"], "job")
        print(cluster.folder, flush=True)
        time.sleep(600)
    """)
    killed = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE, text=True)
    folder = Path(killed.stdout.readline().strip())
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert folder.exists() and list(processes_of(folder))
    another = LocalCluster()
    another.stop()
    assert not folder.exists() and not list(processes_of(folder))
    assert slurm.node_states() == ["idle", "idle"]
