#!/usr/bin/env bash
# Fine-tune a stage-1 student through SAM 3's frozen heads; run the same command again to resume.
#
#   bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh \
#       CFG=stage1_geometry_finetune/configs/es_rv_m.yaml DATA_PATH=data/sa-1b OUTPUT=output/stage1_geometry/es_rv_m \
#       PRETRAINED=output/merged/es_rv_m.safetensors SAM3_CHECKPOINT=sam3_checkpoints/sam3.pt BATCH_SIZE=4 GPUS=8
#
# PRETRAINED is the merged file of stage 1 or its best.pth, SAM3_CHECKPOINT the teacher's file, TEACHER_EMBED_PATH where
# stage 1's export put its embeddings; each has a default in the config. OUTPUT is output/stage1_geometry/<name of the
# config> unless it is given. The other keys are described in scripts/launch.sh, further flags in
# stage1_geometry_finetune/train_geometry_finetune.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
LAUNCH_KEYS="$LAUNCH_KEYS PRETRAINED SAM3_CHECKPOINT TEACHER_EMBED_PATH"
read_launch_words ${1+"$@"}
has_flag --cfg || CFG=${CFG:-$REPO_ROOT/stage1_geometry_finetune/configs/es_rv_m.yaml}
words=()
[ -z "${PRETRAINED:-}" ] || words+=(--pretrained "$PRETRAINED")
[ -z "${SAM3_CHECKPOINT:-}" ] || words+=(--sam3-checkpoint "$SAM3_CHECKPOINT")
[ -z "${TEACHER_EMBED_PATH:-}" ] || words+=(--teacher-embed-path "$TEACHER_EMBED_PATH")
launch stage1_geometry_finetune/train_geometry_finetune.py -- ${words[@]+"${words[@]}"} \
    ${SCRIPT_WORDS[@]+"${SCRIPT_WORDS[@]}"}
