#!/usr/bin/env bash
# Creates the Python environment without running a command in it (setup/run.sh creates it too when it is missing).
set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/run.sh" true
