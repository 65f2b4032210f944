#!/usr/bin/env bash
# Install totalfast into its own virtual environment, and run the linters and the tests.
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
# To run the slow tests: ./scripts/test.sh -m slow
# Two processes, because the start of a command uses one core. Waiting OpenMP threads must not occupy
# the cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec "$environment/bin/python" -m pytest -n 2 --dist worksteal -m "not slow" "$@"
