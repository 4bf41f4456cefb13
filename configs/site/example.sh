# A site file: what the cluster is called by its users. Copy it to configs/site/site.sh (used by itself), or to
# configs/site/NAME.sh and set PIFLOW_SITE=NAME; both are kept out of git. Batch scripts source it, outside a job and in it;
# tools/launch.py reads it too.

# sbatch's own variables (man sbatch, INPUT ENVIRONMENT VARIABLES); they win over the headers of slurm/*.sh.
#SBATCH_PARTITION=gpu
#SBATCH_ACCOUNT=project
#SBATCH_QOS=normal
#SBATCH_TIMELIMIT=12:00:00

# A container through Pyxis and enroot instead of an environment on the nodes; folders with data and weights to mount.
#PIFLOW_CONTAINER=/images/piflow.sqsh
#PIFLOW_MOUNTS=/data:/data,/scratch:/scratch

# The interpreter, where it is neither .venv of the repository nor python in the container.
#PIFLOW_PYTHON=/envs/piflow/bin/python

# Networks that cannot be found out: by default that through which the first node is reached.
#GLOO_SOCKET_IFNAME=ib0
#NCCL_SOCKET_IFNAME=ib0
#MLFLOW_TRACKING_URI=http://mlflow.internal:5000

# Commands for the job's shell, before anything else is run there.
#site_setup() {
#    module load cuda
#}
