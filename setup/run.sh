#!/usr/bin/env bash
# Runs a command in the project's Python environment, and first makes that environment when it is missing or out of date.
#
#   setup/run.sh pytest
#
# The environment is .venv in the repository root. PYTHON=/path/to/python picks the interpreter it is made from. Downloads
# follow pip's own settings, for instance PIP_EXTRA_INDEX_URL.
set -euo pipefail

setup=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
root=$(dirname -- "$setup")
venv=$root/.venv

die() {
  echo "setup/run.sh: $*" >&2
  exit 1
}

usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3.14 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    usable "$candidate" && echo "$candidate" && return
  done
  return 1
}

# The repository path is part of it because a virtual environment cannot be moved.
fingerprint() {
  { echo "$root" && cat "$setup"/requirements*.txt "$setup/constraints.txt"; } | sha256sum
}

current() {
  [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.fingerprint" 2>/dev/null)" = "$(fingerprint)" ]
}

make_venv() {
  local python missing=()
  [ -n "${PYTHON:-}" ] || find_python >/dev/null || missing=(python3 python3-venv)
  "$setup/install.sh" "${missing[@]}"
  python=$(find_python) || die "needs Python 3.11 or newer with its venv module:" \
    "apt-get install python3 python3-venv, or name an interpreter in PYTHON"

  echo "setup/run.sh: making $venv with $(command -v "$python") (some minutes, once)" >&2
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$setup/requirements.txt" -r "$setup/requirements-dev.txt" -r "$setup/requirements-maniskill.txt" \
    -c "$setup/constraints.txt" >&2 &&
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --no-deps -r "$setup/requirements-no-deps.txt" -r "$setup/requirements-maniskill-no-deps.txt" >&2 ||
    die "installing the packages failed: see the message above, check the network, then run the same command again"
  [ ! -d "$venv"/lib/python*/site-packages/sapien ] || "$setup/vulkan/install.sh" "$venv" ||
    echo "setup/run.sh: no Vulkan for the rms_* and ms_* tasks, see above; the others do without" >&2
  fingerprint >"$venv/.fingerprint" # last, so that an interrupted installation is made again
  echo "setup/run.sh: done in $SECONDS s" >&2
}

[ $# -gt 0 ] || die "usage: setup/run.sh COMMAND [ARGUMENT...]"
current || (
  flock 9 # one of several concurrent calls makes it, the others wait
  current || make_venv
) 9>"$root/.venv.lock"

export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
unset PYTHONHOME
exec "$@"
