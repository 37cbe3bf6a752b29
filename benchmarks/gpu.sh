#!/usr/bin/env bash
# All GPU figures in one go, in less than eight minutes: benchmarks/gpu.sh [--device cuda|cpu] [FOLDER]
# Needs a CUDA machine with torch, numpy and pytest; neither Flower nor Ray. --device cpu runs the same script at the
# smallest scale, to prove it. What is printed is also written to FOLDER (default benchmarks/results), into a file named
# after the hardware. Exits 1 if a part failed; the others are run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda
if [ "${1:-}" = --device ]; then
    device=$2
    shift 2
fi
folder=${1:-benchmarks/results}
mkdir -p "$folder"
python=${PYTHON:-python3}
"$python" -c "import pytest" 2>/dev/null || { echo "gpu.sh: $python has no pytest; pip install pytest" >&2; exit 1; }
name=$("$python" benchmarks/gpu_figures.py --device "$device" --name) || exit 1
report="$folder/$name.txt"
failed=0

say() {
    printf '\n$ %s\n' "$*"
    "$@" || failed=1
}

figures() {
    printf '%s, %s\n' "$(date -u +%Y-%m-%d)" "$(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')"
    say "$python" -m pytest -o addopts= -q -m gpu tests/gpu
    if [ "$device" = cuda ]; then
        for scale in tiny small paper; do
            say "$python" benchmarks/supernet_step.py --device cuda --scale "$scale" --pairs 5
        done
        say "$python" benchmarks/supernet_step.py --device cuda --scale paper --kept genotype --pairs 5
        say "$python" benchmarks/gpu_figures.py --device cuda --scale paper
    else
        say "$python" benchmarks/supernet_step.py --device cpu --scale tiny --pairs 5
        say "$python" benchmarks/gpu_figures.py --device cpu --scale tiny --seconds 0.3
    fi
    return "$failed"
}

figures 2>&1 | tee "$report"
