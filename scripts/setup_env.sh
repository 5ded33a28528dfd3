# shellcheck shell=bash
# Sourced by demo.sh, test.sh and .ci/run: a Python environment with this project in it. Nothing runs when it is sourced.
#
#   setup_env EXTRAS    EXTRAS is demo or dev (dev holds demo). Makes or reuses the environment, exports VENV and puts
#                       its bin folder first on PATH. Unchanged dependencies cost about a second.
#
# EFFICIENTSAM3_VENV    the environment to use, made if it is not there; default .venv in the clone. What an environment
#                       that was not made here already holds stays as it is: only missing packages are added.
# PYTHON                the interpreter that makes the environment; default the first Python >= 3.10 on PATH
# EFFICIENTSAM3_DISK_GB free space asked for before an install; default 6 (the CUDA build of torch unpacked)
# PIP_*                 pip's own settings (index, cache, certificates) are left alone
#
# Written for bash 3.2 and up, so that it runs on macOS too.

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "error: $*" >&2
    exit 2
}

# Prints the interpreter that makes new environments.
find_python() {
    local candidate
    local is_recent='import sys; sys.exit(sys.version_info < (3, 10))'
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not a command: name a Python >= 3.10"
        "$PYTHON" -c "$is_recent" 2>/dev/null ||
            die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 | head -n 1): this project needs Python >= 3.10"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "$is_recent" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python >= 3.10 on PATH: install one, or name it with PYTHON=/path/to/python3.11"
}

# Prints a hash of all that decides which packages an environment holds. $1: the interpreter.
dependency_key() {
    "$1" - "$REPO_ROOT/pyproject.toml" "$REPO_ROOT/constraints.txt" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
for name in sys.argv[1:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest()[:16])
PY
}

require_disk() {
    local needed_gb=${EFFICIENTSAM3_DISK_GB:-6} parent free_kb
    parent=$(dirname "$VENV")
    free_kb=$(df -Pk "$parent" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $((needed_gb * 1024 * 1024)) ] ||
        die "$((free_kb / 1024 / 1024)) GB free at $parent, $needed_gb GB needed to install torch and the rest: make" \
            "room, name a roomier place with EFFICIENTSAM3_VENV, or lower EFFICIENTSAM3_DISK_GB for a CPU build of torch"
}

make_venv() {
    local python
    python=$(find_python) || exit 2
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv module: install it (Debian, Ubuntu: apt install python3-venv) or choose another PYTHON"
    echo "== environment: $VENV ($("$python" --version 2>&1))"
    mkdir -p "$VENV_STATE"
    touch "$VENV_STATE/made-here" "$VENV_STATE/unfinished"
    "$python" -m venv "$VENV" || die "$python could not make an environment at $VENV"
}

# Prints the constraints for an install: all of them in an environment made here, else those of missing packages.
write_constraints() {
    if [ -e "$VENV_STATE/made-here" ]; then
        cat "$REPO_ROOT/constraints.txt"
        return
    fi
    "$VENV/bin/python" - "$REPO_ROOT/constraints.txt" <<'PY'
import importlib.metadata, pathlib, re, sys

def held_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

def partner(name):
    """The release that goes with a held torch or torchvision, which are a pair: 2.m and 0.(m + 15)."""
    other, shift, major = {"torch": ("torchvision", -15, 2), "torchvision": ("torch", 15, 0)}[name]
    minor = re.match(r"\d+\.(\d+)", held_version(other) or "")
    return minor and f"{name}=={major}.{int(minor[1]) + shift}.*"

done = set()
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    name = line.split("==")[0].strip()
    if not name or name.startswith("#"):
        continue
    held = held_version(name)
    if held is None:
        print(name in ("torch", "torchvision") and partner(name) or line)
    elif name not in done:
        print(f"{name}=={held}")
    done.add(name)
PY
}

# Installs the project with its extras. The marker tells the next run when this one was cut short.
install_project() {
    local extras=$1 key=$2
    "$VENV/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || require_disk
    mkdir -p "$VENV_STATE"
    rm -f "$VENV_STATE"/installed-*
    touch "$VENV_STATE/unfinished"
    write_constraints >"$VENV_STATE/constraints.txt" || die "could not read constraints.txt"
    echo "== installing efficientsam3[$extras] into $VENV (about 3 minutes and 6 GB the first time)"
    (cd "$REPO_ROOT" && "$VENV/bin/python" -m pip install -c "$VENV_STATE/constraints.txt" -e ".[$extras]") ||
        die "pip could not install efficientsam3[$extras] into $VENV: its message above says why; run again when it is mended"
    echo "$REPO_ROOT" >"$VENV_STATE/clone"
    echo "$key" >"$VENV_STATE/installed-$extras"
    rm -f "$VENV_STATE/unfinished"
}

is_installed() {
    local extras=$1 key=$2 name
    [ "$extras" = demo ] && extras="demo dev"
    for name in $extras; do
        [ "$(cat "$VENV_STATE/installed-$name" 2>/dev/null)" = "$key" ] && return 0
    done
    return 1
}

setup_env() {
    local extras=$1 key
    VENV=${EFFICIENTSAM3_VENV:-$REPO_ROOT/.venv}
    case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
    VENV_STATE=$VENV/efficientsam3-state
    mkdir -p "$(dirname "$VENV")" || die "cannot write to $(dirname "$VENV"): name another place with EFFICIENTSAM3_VENV"
    if command -v flock >/dev/null; then # two runs at once must not install into one environment
        (exec 9>>"$VENV.lock") 2>/dev/null ||
            die "cannot write $VENV.lock: name another place with EFFICIENTSAM3_VENV"
        exec 9>>"$VENV.lock"
        flock 9
    fi
    if [ -e "$VENV_STATE/made-here" ] && { [ -e "$VENV_STATE/unfinished" ] || ! "$VENV/bin/python" -c '' 2>/dev/null; }; then
        echo "== $VENV is half made or its Python has gone: making it again"
        rm -rf "$VENV"
    fi
    if [ ! -e "$VENV/bin/python" ]; then
        [ -z "$(ls -A "$VENV" 2>/dev/null)" ] ||
            die "EFFICIENTSAM3_VENV=$VENV is not empty and no environment (no bin/python): name another path, or remove it"
        make_venv
    fi
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$VENV holds $("$VENV/bin/python" --version 2>&1 | head -n 1): this project needs Python >= 3.10"
    key=$(dependency_key "$VENV/bin/python") || die "could not hash pyproject.toml and constraints.txt"
    if ! is_installed "$extras" "$key"; then
        install_project "$extras" "$key"
    elif [ "$(cat "$VENV_STATE/clone" 2>/dev/null)" != "$REPO_ROOT" ]; then
        echo "== pointing $VENV at $REPO_ROOT"
        (cd "$REPO_ROOT" && "$VENV/bin/python" -m pip install --quiet --no-deps -e .) ||
            die "pip could not point $VENV at $REPO_ROOT: its message above says why"
        echo "$REPO_ROOT" >"$VENV_STATE/clone"
    fi
    touch "$VENV_STATE/used"
    if command -v flock >/dev/null; then
        exec 9>&-
    fi
    # PYTHON named the interpreter to make the environment from; from here on it is the one inside.
    export VENV PATH="$VENV/bin:$PATH" PYTHON=$VENV/bin/python
    hash -r
}
