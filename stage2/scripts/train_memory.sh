#!/usr/bin/env bash
# Train the compressed memory of a tracker on videos; run the same command again to resume.
#
#   bash stage2/scripts/train_memory.sh GPUS=8 BATCH_SIZE=1 DATA_PATH=data/sa-v SUBSET_FRACTION=0.1 \
#       SAM3_CHECKPOINT=output/merged/es_rv_m.safetensors OUTPUT=output/stage2/es_rv_m
#   bash stage2/scripts/train_memory.sh 8 1 data/sa-v 0.1    # the first four without their names, in this order
#
# SAM3_CHECKPOINT is sam3.pt or a student of the earlier stages merged into it, PRETRAINED a memory to start from.
# OUTPUT is output/stage2/<name of the config> unless it is given. The other keys are described in scripts/launch.sh,
# further flags in stage2/train_memory_stage2.py. The run ends with OUTPUT/model_final.pth.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
LAUNCH_KEYS="$LAUNCH_KEYS SUBSET_FRACTION SAM3_CHECKPOINT PRETRAINED"
named=()
for key in GPUS BATCH_SIZE DATA_PATH SUBSET_FRACTION; do
    case ${1:-} in "" | -* | [A-Z]*=*) break ;; esac
    named+=("$key=$1")
    shift
done
read_launch_words ${named[@]+"${named[@]}"} ${1+"$@"}
has_flag --cfg || CFG=${CFG:-$REPO_ROOT/stage2/configs/base_memory.yaml}
words=()
[ -z "${SUBSET_FRACTION:-}" ] || words+=(--subset-fraction "$SUBSET_FRACTION")
[ -z "${SAM3_CHECKPOINT:-}" ] || words+=(--sam3-checkpoint "$SAM3_CHECKPOINT")
[ -z "${PRETRAINED:-}" ] || words+=(--pretrained "$PRETRAINED")
launch stage2/train_memory_stage2.py -- ${words[@]+"${words[@]}"} ${SCRIPT_WORDS[@]+"${SCRIPT_WORDS[@]}"}
