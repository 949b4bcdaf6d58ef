#!/usr/bin/env bash
# Makes the Python environment without running anything in it (setup/run.sh makes it by itself when it is missing).
set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/run.sh" true
