#!/usr/bin/env bash
# Set up and check everything: ruff, mypy, pytest. Words on the command line go to pytest.
#   bash scripts/test.sh              all of it
#   bash scripts/test.sh -n 0 -k merge tests/stage1
# EFFICIENTSAM3_VENV, PYTHON, PIP_*: see setup_env.sh. TEST_WORKERS: pytest processes, default one a core, at most 8.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env dev
cd "$REPO_ROOT"

failed=""
check() {
    echo "== $*"
    "$@" || failed="$failed, $*"
}
check ruff check .
check ruff format --check .
check mypy

cores=$(python -c 'import os; print(min(8, os.cpu_count() or 1))')
# One thread a process: the tests' tensors are small, and two processes that each start a thread a core only wait.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check python -m pytest -n "${TEST_WORKERS:-$cores}" --dist loadgroup --durations 15 "$@"
if [ -n "$failed" ]; then
    echo "failed: ${failed#, }" >&2
    exit 1
fi
