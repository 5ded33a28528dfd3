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
# NNODES RDZV_ENDPOINT                      several nodes: the same command on each; host:port of one of them
# NODE_RANK                                 0 .. NNODES-1, its own on each node, RDZV_ENDPOINT being on node 0; without
#                                           it the nodes number themselves, and OUTPUT must be a folder that all share
# RDZV_BACKEND RDZV_ID                      default static with NODE_RANK, c10d without (c10d ignores NODE_RANK)
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

# Whether a flag, alone or as --flag=value, is among SCRIPT_WORDS.
has_flag() {
    local word
    for word in ${SCRIPT_WORDS[@]+"${SCRIPT_WORDS[@]}"}; do
        case $word in "$1" | "$1="*) return 0 ;; esac
    done
    return 1
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

# Sets NODE_WORDS, by which the processes of all nodes find each other.
choose_nodes() {
    NNODES=${NNODES:-1}
    require_number NNODES "$NNODES"
    require_number NODE_RANK "${NODE_RANK:-0}"
    [ -z "${MASTER_PORT:-}" ] || require_number MASTER_PORT "$MASTER_PORT"
    if [ "$NNODES" -le 1 ]; then
        NODE_WORDS=(--standalone)
        [ -z "${MASTER_PORT:-}" ] || NODE_WORDS=(--master_port "$MASTER_PORT")
        return
    fi
    [ "${NODE_RANK:-0}" -lt "$NNODES" ] || launch_error "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES"
    [ -n "${RDZV_ENDPOINT:-}" ] ||
        launch_error "NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on all nodes: where they meet (node 0)"
    case $RDZV_ENDPOINT in *:*) ;; *) RDZV_ENDPOINT=$RDZV_ENDPOINT:${MASTER_PORT:-29500} ;; esac
    RDZV_BACKEND=${RDZV_BACKEND:-${NODE_RANK:+static}}
    RDZV_BACKEND=${RDZV_BACKEND:-c10d}
    NODE_WORDS=(--nnodes "$NNODES" --rdzv_backend "$RDZV_BACKEND" --rdzv_endpoint "$RDZV_ENDPOINT")
    NODE_WORDS+=(--rdzv_id "${RDZV_ID:-efficientsam3}")
    if [ "$RDZV_BACKEND" = static ]; then
        [ -n "${NODE_RANK:-}" ] || launch_error "RDZV_BACKEND=static needs NODE_RANK, another one on each node"
        NODE_WORDS+=(--node_rank "$NODE_RANK")
    elif [ -n "${NODE_RANK:-}" ]; then
        echo "note: RDZV_BACKEND=$RDZV_BACKEND numbers the nodes itself: NODE_RANK=$NODE_RANK has no effect" >&2
    fi
}

launch() {
    local script=$1 torchrun_words flag_words
    shift
    read_launch_words ${1+"$@"}
    choose_processes
    choose_nodes
    torchrun_words=(--nproc_per_node "$NPROC" "${NODE_WORDS[@]}")
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
