#!/usr/bin/env bash
# Metrics of sample folders, over all tasks: sbatch slurm/evaluate.sh samples=[DIR,DIR] reference=DIR [key=value ...], from the
# repository's folder. Sampling is slurm/sample.sh's part.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export PIFLOW_ROOT=${PIFLOW_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$PIFLOW_ROOT/slurm/common.sh" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || submit "$0" "$@"
settings=$(alone -m piflow_dist.launch.batch evaluate "$@") || exit
[ -n "$settings" ] || exit 0  # launch.dry_run
everywhere -m piflow_dist.evaluation.compare "$settings" || failed "${settings%/*}" $?
alone -m piflow_dist.launch.batch report "$settings"
