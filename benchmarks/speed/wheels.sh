#!/usr/bin/env bash
# Fills .wheels with the packages that a machine with torch, torchvision, transformers, accelerate, pandas and
# pyarrow but without a registry lacks for the GPU runs (speed and scale): TRL and DeepSpeed with what they need,
# bitsandbytes, and what of ours may be missing. PYTHON_VERSION: that machine's. Some 20 MB.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
mkdir -p .wheels
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --dest .wheels \
    trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \
    jaxtyping==0.3.11 wadler-lindig==0.1.8 cloudpickle==3.1.2 \
    hydra-core==1.3.8 omegaconf==2.3.1 math-verify==0.9.0 latex2sympy2-extended==1.11.0
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --dest .wheels \
    hjson==3.1.0 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 \
    bitsandbytes==0.50.2
# Kernels for other makers' cards and for CUDA before 13, four fifths of it.
zip -qd .wheels/bitsandbytes-*.whl '*_rocm*.so' '*_xpu*.so' '*_cuda11*.so' '*_cuda12*.so'
# These have no wheels on the registry. DeepSpeed without operators of its own, of which nothing here needs any.
"$python" -m pip wheel --quiet --no-deps --wheel-dir .wheels antlr4-python3-runtime==4.9.3
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .wheels deepspeed==0.19.8
ls -l .wheels
du -sh .wheels
