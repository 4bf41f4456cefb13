#!/usr/bin/env bash
# The 4-step student of Qwen-Image, GMFlow policy: sbatch slurm/qwen_gmm.sh [key=value ...], from the repository's folder.
#SBATCH --job-name=qwen_gmm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export PIFLOW_ROOT=${PIFLOW_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$PIFLOW_ROOT/slurm/common.sh" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || submit "$0" "$@"
train experiment=qwen_gmm "$@"
