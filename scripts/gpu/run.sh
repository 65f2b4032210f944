#!/usr/bin/env bash
# Run on the machine with the GPU, in the project's root, after scripts/pack_for_gpu.sh packed .gpu/:
#
#     bash .gpu/run.sh [SECONDS] [STEP ...]    # results in $OUT, default gpu-results/
#
# Installs the packed wheels into a temporary folder, without a network, and runs
# scripts/benchmark_gpu.py. Nothing that is installed on the machine is changed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export OUT=${OUT:-gpu-results}
site=${SITE:-${TMPDIR:-/tmp}/totalfast-gpu-site}
python=${PYTHON:-python3}
mkdir -p "$OUT"
if [ ! -e "$site/complete" ]; then
    mapfile -t missing < <("$python" "$here/missing.py" "$here/if-missing")
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$here"/wheels/*.whl "${missing[@]}" > "$OUT/install.log" 2>&1 \
        && touch "$site/complete" || tail -3 "$OUT/install.log"
fi
export PYTHONUNBUFFERED=1 PYTHONPATH=$site:${PYTHONPATH:+$PYTHONPATH:}$here/stubs
"$python" scripts/benchmark_gpu.py "${@:-480}" 2>&1 | tee "$OUT/log.txt"
