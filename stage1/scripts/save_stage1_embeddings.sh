#!/usr/bin/env bash
# Export the teacher's embeddings of a data set; run the same command again to resume, or to add new images.
#
#   bash stage1/scripts/save_stage1_embeddings.sh DATA_PATH=data/sa-1b OUTPUT=output/stage1_teacher GPUS=8
#   bash stage1/scripts/save_stage1_embeddings.sh --check-saved-embed      # compare stored embeddings with the teacher
#
# Keys (words or environment) are described in scripts/launch.sh, further flags in stage1/save_embedding_stage1.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
CFG=${CFG:-$REPO_ROOT/stage1/configs/teacher/sam_vit_huge_sa1b.yaml}
launch stage1/save_embedding_stage1.py "$@"
