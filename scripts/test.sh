#!/usr/bin/env bash
# Install totalfast into a virtual environment of its own and run its tests.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${TOTALFAST_VENV:-.venv-test}
python=${PYTHON:-python3}
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --upgrade pip
"$environment/bin/python" -m pip install --quiet -e '.[test,dev]'
"$environment/bin/ruff" check .
"$environment/bin/ruff" format --check .
"$environment/bin/mypy"
"$environment/bin/lint-imports" --no-cache
# Tests that are marked slow run if they are asked for: ./scripts/test.sh -m slow
# Two at a time: half of a test is the start of a command, which one core does. Threads that wait for
# work must not keep the cores from one another meanwhile.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec "$environment/bin/python" -m pytest -n 2 --dist worksteal -m "not slow" "$@"
