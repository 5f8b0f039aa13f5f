#!/usr/bin/env bash
# Preprocess a dataset as a Slurm job array; each task processes a share of the sources.
#   sbatch --array 0-15 launch_scripts/preprocess_slurm.sh --input DIR --output-prefix DIR/data --tokenizer-model DIR
#SBATCH --job-name=hrm-data
#SBATCH --output=hrm-data-%A_%a.log
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
# The array must be 0 to N-1 without gaps: task I builds --shard I/N. The last task to finish completes the dataset.
# Submit a task that died again with the same N: TASKS=16 sbatch --array 3 ...
# TASKS   number of shares (default: number of tasks in the array)
# PYTHON  default: that of .venv, else the one on PATH
# All arguments are passed to tools/preprocess_data.py, after --workers with the number of CPUs that Slurm gave.
set -euo pipefail

case ${1:-} in
    --help | -h) awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0" && exit ;;
esac
fail() { echo "preprocess_slurm.sh: $*" >&2 && exit 2; }
task=${SLURM_ARRAY_TASK_ID:?not inside a job array: use sbatch --array 0-N}
tasks=${TASKS:-${SLURM_ARRAY_TASK_COUNT:?Slurm gave no number of tasks: set TASKS}}
if ! [[ $tasks =~ ^[1-9][0-9]*$ ]]; then fail "TASKS=$tasks: give a whole number from 1"; fi
if ((task >= tasks)); then fail "task $task, but $tasks shares: --array 0-$((tasks - 1)) makes all of them"; fi
if [ -z "${TASKS:-}" ] && ((SLURM_ARRAY_TASK_MIN != 0 || SLURM_ARRAY_TASK_MAX != tasks - 1)); then
    fail "tasks $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX, $tasks in number, leave shares out: set TASKS to all"
fi

root=$(cd "$(dirname "$0")/.." && pwd)
if ! [ -d "$root/hrm_megatron" ]; then # sbatch runs a copy of this file: ask Slurm for the path of the original
    job=''
    if [[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ ]]; then job=$(scontrol show job "$SLURM_JOB_ID") || job=''; fi
    file=${job#*Command=} # with its arguments, and maybe as a relative path
    if [ "${file::1}" != / ]; then file=${SLURM_SUBMIT_DIR:-$PWD}/$file; fi
    root=${file%%/launch_scripts/preprocess_slurm.sh*}
    if ! [ -d "$root/hrm_megatron" ]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi
    if ! [ -d "$root/hrm_megatron" ]; then fail "no hrm_megatron in $root: submit the project's own file, no copy"; fi
    root=$(cd "$root" && pwd)
fi
python=${PYTHON:-$root/.venv/bin/python}
if ! [ -x "$python" ]; then python=python; fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/tools/preprocess_data.py" --workers "${SLURM_CPUS_PER_TASK:-1}" "$@" --shard "$task/$tasks"
