#!/usr/bin/env bash
# Fills .wheels with the packages that a machine with torch, torchvision, transformers, accelerate, pandas and
# pyarrow but without a registry lacks for the GPU run: TRL with what it needs, and what of ours may be missing.
# Pure Python all of them. PYTHON_VERSION: that machine's.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
mkdir -p .wheels
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --dest .wheels \
    trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \
    jaxtyping==0.3.11 wadler-lindig==0.1.8 cloudpickle==3.1.2 \
    hydra-core==1.3.8 omegaconf==2.3.1 math-verify==0.9.0 latex2sympy2-extended==1.11.0
# It has no wheel on the registry.
"$python" -m pip wheel --quiet --no-deps --wheel-dir .wheels antlr4-python3-runtime==4.9.3
ls -l .wheels
du -sh .wheels
