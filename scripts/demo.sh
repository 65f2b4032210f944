#!/usr/bin/env bash
# Install totalfast into its own virtual environment, and run its demo. Downloads no model.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${TOTALFAST_VENV:-.venv-demo}
python=${PYTHON:-python3}
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --upgrade pip
"$environment/bin/python" -m pip install --quiet -e .
exec "$environment/bin/totalfast" demo "$@"
