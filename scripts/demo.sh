#!/usr/bin/env bash
# Set up and run every stage on the demo world; ends with output/demo/index.html. Words go to scripts/demo.py.
#   bash scripts/demo.sh
#   bash scripts/demo.sh --fresh
# EFFICIENTSAM3_VENV, PYTHON, PIP_*: see setup_env.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env demo
exec python "$REPO_ROOT/scripts/demo.py" "$@"
