# shellcheck shell=bash
# Sourced by the stage launchers: one way to start a stage under torchrun. Nothing runs when it is sourced.
#
#   launch SCRIPT "$@"    starts SCRIPT (relative to the repository) with the KEY=VALUE words and all other words of "$@"
#
# KEY=VALUE words may stand anywhere and may also come from the environment (a word wins); an unknown KEY is an error.
# Words behind -- are passed on as they are.
#
# CFG DATA_PATH OUTPUT BATCH_SIZE           --cfg --data-path --output --batch-size of the script
# GPUS                                      processes on this node, one GPU each; default all GPUs, 0 runs on the CPU
# NPROC                                     processes on this node, where that is not GPUS: NPROC=2 DEVICE=cpu runs gloo
# DEVICE                                    cpu, cuda or mps; default follows GPUS
# MASTER_PORT                               port of this machine for the ranks to meet; default a free one
# NNODES NODE_RANK RDZV_BACKEND RDZV_ENDPOINT RDZV_ID
#                                           several nodes: run the same command on each, with its own NODE_RANK
# PYTHON                                    the interpreter; default python
#
# Written for bash 3.2 and up, so that it runs on macOS too.

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCH_KEYS="CFG DATA_PATH OUTPUT BATCH_SIZE GPUS NPROC DEVICE MASTER_PORT NNODES NODE_RANK RDZV_BACKEND RDZV_ENDPOINT RDZV_ID PYTHON"

launch_error() {
    echo "error: $*" >&2
    exit 2
}

# Sets the variables of KEY=VALUE words; all other words go to SCRIPT_WORDS.
read_launch_words() {
    local word key
    SCRIPT_WORDS=()
    while [ $# -gt 0 ]; do
        word=$1
        shift
        if [ "$word" = "--" ]; then
            SCRIPT_WORDS+=(${1+"$@"})
            return
        fi
        if [[ $word =~ ^[A-Z][A-Z0-9_]*= ]]; then
            key=${word%%=*}
            case " $LAUNCH_KEYS " in
            *" $key "*) printf -v "$key" '%s' "${word#*=}" ;;
            *) launch_error "unknown key $key in '$word'; known keys: $LAUNCH_KEYS" ;;
            esac
        else
            SCRIPT_WORDS+=("$word")
        fi
    done
}

require_number() {
    [[ $2 =~ ^[0-9]+$ ]] || launch_error "$1=$2 must be a whole number"
}

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        local devices=${CUDA_VISIBLE_DEVICES//[^,]/}
        [ -n "$CUDA_VISIBLE_DEVICES" ] && [ "$CUDA_VISIBLE_DEVICES" != "-1" ] && echo $((${#devices} + 1)) || echo 0
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# Sets DEVICE and NPROC from whatever of GPUS, NPROC and DEVICE was given.
choose_processes() {
    local gpus=${GPUS:-}
    if [ -z "$gpus" ]; then
        case ${DEVICE:-} in
        "" | cuda*) gpus=$(count_gpus) ;;
        *) gpus=0 ;;
        esac
    fi
    require_number GPUS "$gpus"
    if [ "$gpus" -gt 0 ]; then
        DEVICE=${DEVICE:-cuda} NPROC=${NPROC:-$gpus}
    else
        case ${DEVICE:-} in cuda*) launch_error "DEVICE=$DEVICE with GPUS=$gpus: no GPU to run on; use DEVICE=cpu" ;; esac
        # Only GPUS=0 asks for the CPU; without it the script takes the best there is (mps on a Mac).
        DEVICE=${DEVICE:-${GPUS:+cpu}} NPROC=${NPROC:-1}
    fi
    require_number NPROC "$NPROC"
    [ "$NPROC" -gt 0 ] || launch_error "NPROC=$NPROC must be at least 1"
}

choose_threads() {
    local cores
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    [ $((cores / NPROC)) -gt 0 ] && echo $((cores / NPROC)) || echo 1
}

launch() {
    local script=$1 torchrun_words flag_words
    shift
    read_launch_words ${1+"$@"}
    choose_processes
    NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
    require_number NNODES "$NNODES"
    require_number NODE_RANK "$NODE_RANK"
    torchrun_words=(--nproc_per_node "$NPROC")
    if [ "$NNODES" -gt 1 ]; then
        [ "$NODE_RANK" -lt "$NNODES" ] || launch_error "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES"
        torchrun_words+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --rdzv_backend "${RDZV_BACKEND:-c10d}")
        torchrun_words+=(--rdzv_endpoint "${RDZV_ENDPOINT:-localhost:${MASTER_PORT:-29501}}")
        torchrun_words+=(--rdzv_id "${RDZV_ID:-efficientsam3}")
    elif [ -n "${MASTER_PORT:-}" ]; then
        require_number MASTER_PORT "$MASTER_PORT"
        torchrun_words+=(--master_port "$MASTER_PORT")
    else
        torchrun_words+=(--standalone)
    fi
    flag_words=()
    [ -z "${DEVICE:-}" ] || flag_words+=(--device "$DEVICE")
    [ -z "${CFG:-}" ] || flag_words+=(--cfg "$CFG")
    [ -z "${DATA_PATH:-}" ] || flag_words+=(--data-path "$DATA_PATH")
    [ -z "${OUTPUT:-}" ] || flag_words+=(--output "$OUTPUT")
    [ -z "${BATCH_SIZE:-}" ] || flag_words+=(--batch-size "$BATCH_SIZE")
    PYTHON=${PYTHON:-python}
    "$PYTHON" -c 'import sam3_train' 2>/dev/null ||
        launch_error "$PYTHON cannot import this project: activate its environment or set PYTHON (scripts/demo.sh makes one)"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(choose_threads)}
    exec "$PYTHON" -m sam3_train.torchrun "${torchrun_words[@]}" "$REPO_ROOT/$script" \
        ${flag_words[@]+"${flag_words[@]}"} ${SCRIPT_WORDS[@]+"${SCRIPT_WORDS[@]}"}
}
