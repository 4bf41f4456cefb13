# What the batch scripts beside it share; sourced, also by the scripts that tools/launch.py submits. See docs/cluster.md.
#
# The site file (configs/site/NAME.sh, chosen by PIFLOW_SITE=NAME or a path; else configs/site/site.sh, where it exists) knows the
# cluster: sbatch's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, ...), PIFLOW_CONTAINER, PIFLOW_MOUNTS, PIFLOW_PYTHON,
# what gloo and NCCL read, and a function site_setup for modules and the like.
set -u

site_file() {
    local site=${PIFLOW_SITE:-site}
    case $site in
        */*) echo "$site" ;;
        *) echo "$PIFLOW_ROOT/configs/site/$site.sh" ;;
    esac
}

load_site() {
    local file
    file=$(site_file)
    if [ -f "$file" ]; then
        set -a
        source "$file"
        set +a
    elif [ -n "${PIFLOW_SITE:-}" ]; then
        echo "error: PIFLOW_SITE=$PIFLOW_SITE: there is no $file. Give a name from configs/site/ or a path with a slash." >&2
        exit 2
    fi
}

# Outside a job a batch script submits itself, with the site's values: slurm/qwen_gmm.sh [key=value ...]
submit() {
    command -v sbatch > /dev/null || { echo "error: no sbatch here. Log in to a machine of the cluster." >&2; exit 2; }
    exec sbatch --chdir="$PIFLOW_ROOT" "$@"
}

# The interpreter: the site's, that of the repository's environment, or the first of PATH (a container's).
python_of_job() {
    if [ -n "${PIFLOW_PYTHON:-}" ]; then
        echo "$PIFLOW_PYTHON"
    elif [ -z "${PIFLOW_CONTAINER:-}" ] && [ -x "$PIFLOW_ROOT/.venv/bin/python" ]; then
        echo "$PIFLOW_ROOT/.venv/bin/python"
    else
        echo python
    fi
}

prepare_job() {
    if declare -F site_setup > /dev/null; then site_setup; fi
    PYTHON=$(python_of_job)
    export PYTHONPATH="$PIFLOW_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    # Libraries tell users what their own authors should change; set the variable to bring it back.
    export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::FutureWarning,ignore::DeprecationWarning}
    # Where sbatch was told to export nothing, srun would do the same, and tasks lack all that is set here.
    export SLURM_EXPORT_ENV=ALL
    # A step does not take over the job's --cpus-per-task, and gets one core a task where none is asked for.
    local per_node=${SLURM_NTASKS_PER_NODE:-1}
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$(( ${SLURM_CPUS_ON_NODE:-1} / per_node > 0 ? ${SLURM_CPUS_ON_NODE:-1} / per_node : 1 ))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
    local end
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2> /dev/null) || end=
    if [ -n "$end" ] && end=$(date --date="$end" +%s 2> /dev/null); then export PIFLOW_END_TIME=$end; fi
    CONTAINER=()
    if [ -n "${PIFLOW_CONTAINER:-}" ]; then
        local mounts="$PIFLOW_ROOT:$PIFLOW_ROOT${PIFLOW_MOUNTS:+,$PIFLOW_MOUNTS}"
        # A container has no squeue to ask whether an earlier job of a run folder is over.
        export PIFLOW_LIVE_JOBS
        PIFLOW_LIVE_JOBS=$(squeue --noheader --array --user="$(id -un)" --format='%i %T') || unset PIFLOW_LIVE_JOBS
        CONTAINER=(--container-image="$PIFLOW_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
    fi
    # Bash waits for srun, which passes signals on, before it answers them itself.
    trap : TERM USR1 USR2
}

# One process in the job's environment, on the first node.
alone() {
    if [ ${#CONTAINER[@]} -gt 0 ]; then
        srun --nodes=1 --ntasks=1 --overlap "${CONTAINER[@]}" "$PYTHON" "$@"
    else
        "$PYTHON" "$@"
    fi
}

# All tasks of the job. One that fails ends the others.
everywhere() {
    srun --kill-on-bad-exit=1 --unbuffered ${CONTAINER[@]+"${CONTAINER[@]}"} "$PYTHON" "$@"
}

# resumable COMMAND ...: work that a second run continues. Before the time limit (--signal=B:USR1@60) the job is requeued.
resumable() {
    local code
    trap 'echo "The time limit is near: job $SLURM_JOB_ID is put back into the queue." >&2; scontrol requeue "$SLURM_JOB_ID"' USR1
    "$@" &
    wait $!
    code=$?
    if [ $code != 0 ] && is_current; then
        echo "Ended with exit code $code. What is finished is kept: submit the same command again for the rest." >&2
    fi
    return $code
}

# failed FOLDER CODE: end, with what the first task failed of as the last words. srun's code is that of whichever task it ended.
failed() {
    is_current || exit "$2"
    alone -m piflow_dist.launch.batch failed "$1"
    exit 1  # exits.FAILED
}

# claim RUN_DIR: end here where a local run or another job trains in this folder.
claim() {
    alone -m piflow_dist.launch.batch claim "$1" || exit
}

# train key=value ...: check, train, and continue or end. The job's exit code is that of the training (docs/cluster.md).
train() {
    local run_dir
    run_dir=$(alone -m piflow_dist.launch.batch prepare "$@") || exit
    everywhere -m piflow_dist.launch.task "$run_dir/config.yaml"
    after_training "$run_dir" $?
}

# Whether the job is running, and this script is its present attempt. It is not after scancel, nor where SLURM itself has put the
# job back (a lost node, scontrol requeue): the next attempt may have begun while this one is still being ended.
is_current() {
    local job
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID") || return 1
    [[ $job == *" JobState=RUNNING "* && $job == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# after_training RUN_DIR CODE: requeue the job where that can help, and end.
after_training() {
    local delay decision
    is_current || exit "$2"
    delay=$(alone -m piflow_dist.launch.batch after "$1" "$2")
    decision=$?
    if [ $decision = 75 ] && is_current; then  # exits.STOPPED
        echo "Job $SLURM_JOB_ID goes back to the queue." >&2
        # Requeued, this script and the commands it runs get SIGTERM at once: the wait must be set all the same.
        trap '' TERM
        scontrol requeue "$SLURM_JOB_ID" || echo "This job cannot be requeued: submit it again, it goes on from its checkpoint." >&2
        if [ "$delay" -gt 0 ]; then scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$delay"; fi
    fi
    exit $decision
}

load_site
if [ -n "${SLURM_JOB_ID:-}" ]; then prepare_job; fi
