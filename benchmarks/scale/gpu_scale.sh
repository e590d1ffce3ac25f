#!/usr/bin/env bash
# The scale run on one GPU in one command: every recipe, the oracles, ZeRO, LoRA, 7B steps beside the plan.
# Wheels, OUT, PYTHON: as for speed (benchmarks/speed/gpu.sh).
set -uo pipefail
cd "$(dirname "$0")/../.."
export SCRIPT=benchmarks/scale/scale.py OUT=${OUT:-benchmarks/results/gpu_scale}
exec bash benchmarks/speed/gpu.sh "$@"
