#!/usr/bin/env bash
# Measure everything that needs a GPU, with one command and in eight minutes.
#
#   bash benchmarks/gpu/run.sh --prepare           download wheels that the machine may lack; needs a network
#   bash benchmarks/gpu/run.sh OUTDIR              run, on a machine with CUDA, Python and torch; no network
#   bash benchmarks/gpu/run.sh --dry-run OUTDIR    run with tiny shapes on a CPU
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}

if [ "${1:-}" = --prepare ]; then
    rm -rf "$here/wheels"
    exec "$python" -m pip download --no-deps --only-binary=:all: \
        -d "$here/wheels" -r "$here/wheels.txt"
fi

# These wheels are pure Python, so it is enough to unpack them.
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
for wheel in "$here"/wheels/*.whl; do
    [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$unpacked"
done

# Measure this checkout, not an installed package.
export PYTHONPATH="$root:$root/adapters:$root/benchmarks:$root/tests:$unpacked${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # so that imports do not start CUDA before a row is forked
cd "$root"
"$python" -m gpu.kit "$@"
