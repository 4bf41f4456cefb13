#!/usr/bin/env bash
# Images from a run, over all tasks: sbatch slurm/sample.sh source=RUN out=DIR [key=value ...], from the repository's folder.
#SBATCH --job-name=sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export PIFLOW_ROOT=${PIFLOW_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$PIFLOW_ROOT/slurm/common.sh" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || submit "$0" "$@"
out=$(alone -m piflow_dist.launch.batch sample "$@") || exit
[ -n "$out" ] || exit 0  # all images are there, or launch.dry_run
resumable everywhere -m piflow_dist.sampling.sampler "$out/settings.yaml" || failed "$out" $?
alone -m piflow_dist.launch.batch gather "$out"
