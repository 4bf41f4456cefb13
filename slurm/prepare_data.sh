#!/usr/bin/env bash
# A data set for training, by all tasks: sbatch slurm/prepare_data.sh out=DIR source=... [key=value ...], from the repository's folder.
#SBATCH --job-name=prepare_data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export PIFLOW_ROOT=${PIFLOW_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$PIFLOW_ROOT/slurm/common.sh" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || submit "$0" "$@"
resumable everywhere "$PIFLOW_ROOT/tools/prepare_data.py" "$@"
