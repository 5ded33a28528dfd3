#!/usr/bin/env bash
# Distil the teacher's embeddings into a student; run the same command again to resume.
#
#   bash stage1/scripts/train_stage1_student.sh CFG=stage1/configs/es_rv_m.yaml DATA_PATH=data/sa-1b GPUS=8
#
# CFG=a.yaml,b.yaml (or --cfg, more than once) trains several students from one pass over the store.
# OUTPUT is output/stage1/<name of the config> unless it is given. TEACHER_EMBED_PATH is where the export put its
# embeddings. The other keys are described in scripts/launch.sh, further flags in stage1/train_stage1.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
LAUNCH_KEYS="$LAUNCH_KEYS TEACHER_EMBED_PATH"
read_launch_words ${1+"$@"}
has_flag --cfg || CFG=${CFG:-$REPO_ROOT/stage1/configs/es_rv_m.yaml}
IFS=, read -r -a configs <<<"${CFG:-}"
CFG=
words=()
for config in ${configs[@]+"${configs[@]}"}; do
    words+=(--cfg "$config")
done
[ -z "${TEACHER_EMBED_PATH:-}" ] || words+=(--teacher-embed-path "$TEACHER_EMBED_PATH")
launch stage1/train_stage1.py -- ${words[@]+"${words[@]}"} ${SCRIPT_WORDS[@]+"${SCRIPT_WORDS[@]}"}
