#!/usr/bin/env bash
# The GPU run in one command. Wheels that the machine lacks are taken from .wheels (wheels.sh fills it) and
# installed into a folder of their own. OUT: where results go. PYTHON: the one that has torch. SCRIPT: another
# run than that of speed (benchmarks/scale).
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
script=${SCRIPT:-benchmarks/speed/gpu.py}
out=${OUT:-benchmarks/results/gpu}
site=${SITE:-$(mktemp -d)/site}
if compgen -G '.wheels/*.whl' > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" .wheels/*.whl
fi
export PYTHONPATH="$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "$python" "$script" --out "$out" "$@"
