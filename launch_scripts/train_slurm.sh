#!/usr/bin/env bash
# Train on the GPUs of one or many nodes under Slurm; the job requeues itself until --train-iters is reached.
#   PRESET=XL TP=2 PP=4 sbatch --nodes 8 --gpus-per-node 8 --exclusive launch_scripts/train_slurm.sh \
#       --data-path DIR/train --train-iters 50000 --load RUN --save RUN ...
#SBATCH --job-name=hrm
#SBATCH --ntasks-per-node=1
#SBATCH --output=hrm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# One task per node: srun starts torchrun on each node; the rendezvous is on the first node.
# PRESET  model size, see hrm_megatron/config.py (default B)
# TP PP CP  tensor, pipeline and context parallel sizes (default 1 each); the remaining ranks are data parallel
# LAYOUT  preset: the preset's layout for 8, 64 or 512 GPUs instead of TP, PP and CP, with its micro-batch size and
#         recomputation (docs/scaling.md)
# GPUS    per node (default: what Slurm gave the job, SLURM_GPUS_ON_NODE)
# TORCHRUN, PYTHON  the launcher and Python (default: those of .venv, else on PATH)
# MASTER_ADDR, MASTER_PORT  rendezvous: the first node under another name; two free ports, this one and the next
#         (default: derived from the job id, from 20000)
# LAUNCH  torchrun (default), or srun for one task per GPU without torchrun
# NUMA    torchrun's --numa-binding: none, node, ... (default node on nodes with GPUs, several NUMA nodes and numactl)
# CPU_BIND  srun's --cpu-bind (default none under torchrun, which binds by itself, and cores for one task per GPU)
# CONTAINER  image for pyxis and enroot, with this project's requirements; mounted are this project, the submission
#         folder, and MOUNTS, SRC:DST,...: --save and data must be in one of them
# PREFLIGHT  0 disables the node check, which takes at most PREFLIGHT_SECONDS (default 60) plus 10
# PREFLIGHT_LIMITS  flags of python -m hrm_megatron.cluster judge, such as --matmul-tflops 500
# MAX_FAILURES  failed starts allowed in a row without a new save (default 5); within 24 hours four times as many,
#         whatever they save. If training ends twice without a new save, the job stops at once
# With --save RUN the job requeues itself; --load RUN and --train-iters are then required. RUN/slurm holds the list of
# starts, the nodes to avoid, and for each start the logs per rank, manifest.json and errors.txt. Without --save it runs
# once.
# sbatch --signal B:USR1@SECONDS (default 300) must leave time for one step and one save.
# Relative paths are relative to the submission folder.
# All other arguments are passed to hrm_megatron.pretrain. --dry-run prints the command without running it; it works
# outside a job too, with NODES and GPUS set.
set -euo pipefail

dry_run=false load='' save='' train_iters='' flag=''
arguments=()
for argument in "$@"; do
    case $argument in
        --help | -h) awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0" && exit ;;
        --dry-run) dry_run=true && continue ;;
        --*=*) flag=${argument%%=*} value=${argument#*=} ;;
        --*) flag=$argument value='' ;;
        *) value=$argument ;;
    esac
    case $flag in --load) load=$value ;; --save) save=$value ;; --train-iters) train_iters=$value ;; esac
    arguments+=("$argument")
done
fail() { echo "train_slurm.sh: $*" >&2 && exit 2; }
terminated=false
patiently() { # retry a Slurm command while the controller does not answer; each of its own attempts takes seconds too
    local pause
    for pause in 1 2 4 8 15; do
        if "$@"; then return; fi
        if $terminated && ((pause > 2)); then return 1; fi # only KillWait remains, 30 seconds by default
        sleep "$pause"
    done
    "$@"
}
if $dry_run && [ -z "${SLURM_JOB_ID:-}" ]; then
    SLURM_NNODES=${NODES:?outside a Slurm job --dry-run needs the number of nodes: set NODES}
    SLURM_JOB_ID=JOB_ID SLURM_JOB_NODELIST=
elif [ "${NODES:-${SLURM_NNODES:-}}" != "${SLURM_NNODES:-}" ]; then
    fail "NODES=$NODES, but Slurm gave the job ${SLURM_NNODES:-no} nodes: leave NODES out"
fi

root=$(cd "$(dirname "$0")/.." && pwd)
if ! [ -d "$root/hrm_megatron" ]; then # sbatch runs a copy of this file: ask Slurm for the path of the original
    job=''
    if [[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ ]]; then job=$(patiently scontrol show job "$SLURM_JOB_ID") || job=''; fi
    file=${job#*Command=} # with its arguments, and maybe as a relative path
    if [ "${file::1}" != / ]; then file=${SLURM_SUBMIT_DIR:-$PWD}/$file; fi
    root=${file%%/launch_scripts/train_slurm.sh*}
    if ! [ -d "$root/hrm_megatron" ]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi
    if ! [ -d "$root/hrm_megatron" ]; then fail "no hrm_megatron in $root: submit the project's own file, no copy"; fi
    root=$(cd "$root" && pwd)
fi
preset=${PRESET:-B} tp=${TP:-1} pp=${PP:-1} cp=${CP:-1} launch=${LAUNCH:-torchrun}
nodes=${SLURM_NNODES:?not inside a Slurm job: use sbatch or salloc, or launch_scripts/train_node.sh for one node}
slurm_id=$SLURM_JOB_ID # unique, but for one task of an array, whose id also refers to the whole array:
if [ "${SLURM_ARRAY_JOB_ID:-}" = "$SLURM_JOB_ID" ]; then slurm_id=${SLURM_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:?Slurm gave no GPUs: add --gpus-per-node, or set GPUS}}
for size in "$tp" "$pp" "$cp" "$nodes" "$gpus"; do
    if ! [[ $size =~ ^[1-9][0-9]*$ ]]; then
        fail "TP, PP, CP, GPUS and the number of nodes are whole numbers from 1, not '$size'"
    fi
done
if ((nodes * gpus % (tp * pp * cp) != 0)); then
    fail "TP*PP*CP=$((tp * pp * cp)) does not divide the $((nodes * gpus)) GPUs of the job"
fi
case $launch in torchrun | srun) ;; *) fail "LAUNCH=$launch: choose torchrun or srun" ;; esac
if ((${SLURM_CPUS_ON_NODE:-$gpus} < gpus)); then
    fail "Slurm gave the node $SLURM_CPUS_ON_NODE cores for $gpus ranks: add --exclusive, or --cpus-per-task C"
fi

if [ -n "${SLURM_JOB_NODELIST?Slurm gave no list of nodes}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
    hosts=FIRST_NODE
fi
port=29500 # jobs on one node need different ports: otherwise the later job joins the other's store, and ends with it
if [[ $SLURM_JOB_ID =~ ^[0-9]+$ ]]; then port=$((20000 + SLURM_JOB_ID % 6000 * 2)); fi
master=${MASTER_ADDR:-${hosts%%$'\n'*}} port=${MASTER_PORT:-$port}
in_environment() { # a program in the container, else in .venv, else on PATH
    if [ -z "${CONTAINER:-}" ] && [ -x "$root/.venv/bin/$1" ]; then echo "$root/.venv/bin/$1"; else echo "$1"; fi
}
torchrun=${TORCHRUN:-$(in_environment torchrun)} python=${PYTHON:-$(in_environment python)}
if ! [ -x "$torchrun" ]; then torchrun=torchrun; fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

container=()
if [ -n "${CONTAINER:-}" ]; then # pyxis' flags: github.com/NVIDIA/pyxis/wiki/Usage
    container=(--container-image="$CONTAINER" --container-mounts="$root:$root,$PWD:$PWD${MOUNTS:+,$MOUNTS}"
        --container-workdir="$PWD" --no-container-mount-home)
fi
in_container=(srun --overlap --nodes 1 --ntasks 1 ${container[@]+"${container[@]}"}) # the host needs no Python

# Settings of NCCL and of torch's NCCL backend; exported variables win. Network settings (NCCL_SOCKET_IFNAME,
# NCCL_IB_HCA) depend on the site: set them if NCCL chooses the wrong interface, or for all users in /etc/nccl.conf.
# docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html:
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}           # prints the cause of an error, not only its type; otherwise silent
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}   # 4.096 us x 2^22 = 17 s a try, to survive link flaps (default 20: 4 s)
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7} # tries before the link counts as dead: 7 is maximum and default
# torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp and FlightRecorder.hpp:
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} # on a hang, dump what each rank waits for
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1} # pytorch issue 135712: restarts hang
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}          # number of collectives that a rank records

# Folder in which the run records its starts; without it the job is not requeued.
slurm='' logs=()
restart=${SLURM_RESTART_COUNT:-0}
if [ -z "$save" ]; then
    $dry_run || echo "slurm: no --save, so the job runs once" >&2
else
    if [ "$load" != "$save" ]; then
        fail "--save $save, but --load is '$load': the job goes on by itself from what it saved: give --load $save"
    fi
    if ! [[ $train_iters =~ ^[1-9][0-9]*$ ]]; then
        fail "--train-iters '$train_iters': the job goes on by itself until then: give a whole number from 1"
    fi
    slurm=$save/slurm
    logs=(--logs "$slurm/$SLURM_JOB_ID.$restart")
    # Megatron's handler saves after the current step and exits with 0 (training.py, checkpoint_and_decide_exit).
    arguments=(--exit-signal-handler --exit-signal SIGUSR1 ${arguments[@]+"${arguments[@]}"})
fi

layout=(--tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" --context-parallel-size "$cp")
if ((tp > 1)); then layout+=(--sequence-parallel); fi
if [ "${LAYOUT:-}" = preset ]; then
    if [ -n "${TP:-}${PP:-}${CP:-}" ]; then fail "LAYOUT=preset chooses TP, PP and CP: leave them out"; fi
    asked=("$python")
    if ((${#container[@]})) && ! $dry_run; then asked=("${in_container[@]}" "$python"); fi
    flags=$("${asked[@]}" -m hrm_megatron.planner.presets "$preset" "$((nodes * gpus))")
    read -ra layout <<<"$flags"
elif [ -n "${LAYOUT:-}" ]; then
    fail "LAYOUT=$LAYOUT: the only one that is known is preset"
fi
training=(-m hrm_megatron.pretrain --hrm-preset "$preset" "${layout[@]}")
training+=(${arguments[@]+"${arguments[@]}"})
task=("$python" -m hrm_megatron.cluster.node ${logs[@]+"${logs[@]}"})
if [ "$launch" = torchrun ]; then
    command=(srun --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 --cpu-bind="${CPU_BIND:-none}"
        ${container[@]+"${container[@]}"} "${task[@]}" ${NUMA:+--numa-binding "$NUMA"} -- "$torchrun"
        --nnodes "$nodes" --nproc-per-node "$gpus"
        --rdzv-id "${SLURM_JOB_ID:?}" --rdzv-backend c10d --rdzv-endpoint "$master:$port" "${training[@]}")
else
    # Each rank gets an equal share of the node's cores, in rank order, and local memory. No --gpus-per-task: a rank
    # must see the other GPUs of the node for NCCL's peer-to-peer copies.
    cpus=$((${SLURM_CPUS_ON_NODE:-$gpus} / gpus))
    export MASTER_ADDR=$master MASTER_PORT=$port # as torchrun would
    command=(srun --ntasks $((nodes * gpus)) --ntasks-per-node "$gpus" --cpus-per-task="$((cpus > 0 ? cpus : 1))"
        --kill-on-bad-exit=1 --label --cpu-bind="${CPU_BIND:-cores}" --mem-bind=local
        ${container[@]+"${container[@]}"} "${task[@]}" --rank -- "$python" "${training[@]}")
fi

if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if [ -z "$slurm" ]; then exec "${command[@]}"; fi

signalled=() cancelled=() running='' excluded='' interrupted=false
remind() { # ranks without a handler yet miss the signal, so repeat it until the launch has ended
    if [ -n "$running" ]; then while kill -USR1 "$running" 2>/dev/null; do sleep 5; done & fi
}
trap 'interrupted=true; if ((${#signalled[@]} == 0)); then signalled=(--signalled); remind; fi' USR1
trap 'interrupted=true terminated=true' TERM
ask() { # ask WHAT ARGUMENTS: sets `action` and `excluded` (hrm_megatron/cluster/__main__.py)
    local what=$1 answer asked=("$python" -m hrm_megatron.cluster)
    shift
    if [ -n "${CONTAINER:-}" ]; then asked=("${in_container[@]}" "${asked[@]}"); fi
    answer=$("${asked[@]}" "$what" --folder "$slurm" --checkpoints "$save" --max-failures "${MAX_FAILURES:-5}" \
        --job "$SLURM_JOB_ID" --restart "$restart" "$@")
    read -r action excluded <<<"$answer"
}
act() { # do what the last answer says; return if it says `go`
    case $action in
        go) return ;;
        done) exit 0 ;;
        requeue) requeue ;;
        *) exit 1 ;;
    esac
}
requeue() {
    local job known=true unique
    # Requeueing ends this script, and Slurm accepts nodes to exclude only for a pending job: KillWait seconds
    # (slurm.conf, 30 by default) remain in between.
    trap '' TERM
    if [ -n "$excluded" ]; then
        job=$(patiently scontrol show job "$slurm_id") || known=false
        if [[ $job =~ ExcNodeList=([^[:space:]]+) ]] && [ "${BASH_REMATCH[1]}" != "(null)" ]; then
            excluded=${BASH_REMATCH[1]},$excluded
        fi
        unique=$(scontrol show hostnames "$excluded" | sort -u | paste -sd ,) && excluded=${unique:-$excluded}
        count_what_is_left
    fi
    patiently scontrol requeue "$slurm_id" || fail "Slurm did not queue the job again: submit the same once more"
    if [ -z "$excluded" ]; then exit 0; fi
    if ! $known || ! patiently scontrol update "JobId=$slurm_id" "ExcNodeList=$excluded"; then
        echo "slurm: Slurm was not told to avoid $excluded: a start that is given one is queued once more" >&2
    fi
    exit 0
}
count_what_is_left() { # Slurm leaves a job pending even if it can never get enough nodes
    local there left
    there=$(sinfo --noheader --Node --partition "${SLURM_JOB_PARTITION:-}" --format %N | sort -u) || return 0
    left=$(grep -cvxFf <(tr , '\n' <<<"$excluded") <<<"$there") || true # grep fails if it counts none
    if [ -z "$there" ] || ((left >= nodes)); then return; fi
    echo "slurm: only $left of $nodes nodes are left without $excluded, so the job waits until you mend one, delete" \
        "its line in $slurm/excluded.json, and type: scontrol update JobId=$slurm_id ExcNodeList=" >&2
}
jobs_of_the_run() { # job ids of this run that still hold nodes; ids are the names of the start folders
    local jobs
    jobs=$(find "$slurm" -maxdepth 1 -name '[0-9]*.[0-9]*' -printf '%f\n' | cut -d . -f 1 | sort -u | paste -sd ,)
    patiently squeue --noheader --jobs "$jobs" --states RUNNING,COMPLETING,SUSPENDED --format %A || true
}

mapfile -t names <<<"$hosts"
mkdir -p "$slurm/$SLURM_JOB_ID.$restart" # the container must see it too
ask begin --running "$(jobs_of_the_run)" --nodes "${names[@]}" -- "${command[@]}"
act
if [ "${PREFLIGHT:-1}" != 0 ]; then
    reports=$slurm/$SLURM_JOB_ID.$restart/preflight real_gpus=0
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ] || compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
        real_gpus=$gpus
    else
        echo "slurm: neither Slurm nor this node has GPUs, so the check expects none on the nodes of the job" >&2
    fi
    srun --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=0 --cpu-bind=none ${container[@]+"${container[@]}"} \
        timeout --signal KILL "$((${PREFLIGHT_SECONDS:-60} + 30))" "$python" -m hrm_megatron.cluster.preflight \
        --output "$reports" --storage "$slurm" --gpus "$real_gpus" \
        --timeout-seconds "${PREFLIGHT_SECONDS:-60}" --master "$master:$((port + 1))" --training-port "$port" ||
        echo "slurm: the check of the nodes was not completed on all of them" >&2
    read -ra limits <<<"${PREFLIGHT_LIMITS:-}"
    ask judge --reports "$reports" ${limits[@]+"${limits[@]}"}
    act
fi

code=0 # nothing is launched if the signal came before
if ((${#signalled[@]} == 0)); then
    "${command[@]}" &
    running=$!
    if ((${#signalled[@]})); then remind; fi # the signal came between the two lines
    while :; do # a trap interrupts bash's `wait`
        interrupted=false code=0
        wait "$running" || code=$?
        if ! $interrupted || ((code <= 128)); then break; fi
    done
fi
# A cancelled, preempted or timed-out job is no longer RUNNING; Slurm gives a reason only for the time limit.
state=$(patiently squeue --noheader --jobs "$slurm_id" --format '%T %r') || state=unknown
case $state in
    RUNNING*) ;;
    unknown) if $terminated && ((${#signalled[@]} == 0)); then cancelled=(--cancelled); fi ;;
    *TimeLimit) signalled=(--signalled) ;;
    *) cancelled=(--cancelled) ;;
esac
ask end --code "$code" --train-iters "$train_iters" ${signalled[@]+"${signalled[@]}"} ${cancelled[@]+"${cancelled[@]}"}
act
