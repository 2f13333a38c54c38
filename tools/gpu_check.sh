#!/usr/bin/env bash
# All checks that need a GPU, in one command: tools/gpu_check.sh [OUT]
# The GPU suite, then the benchmarks on Qwen2.5's shapes with random weights (memory by phase against the plan, seconds
# per prompt, TRL), then a short run of the embedded policy. benchmarks.gpu alone takes less than 9 minutes.
# Numbers go to OUT (default: gpu-results) as JSON; each benchmark prints its table. Needs the environment of
# `make install`, or a PYTHON in which the packages of pyproject.toml can be imported.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-gpu-results}")
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
mkdir -p "$OUT"
"$PYTHON" -m pytest -m gpu tests/gpu tests/test_metrics.py -q 2>&1 | tee "$OUT/pytest.txt" | tail -20
"$PYTHON" -m benchmarks.gpu --out "$OUT/gpu-1.5b.json" 2>&1 | tee "$OUT/gpu-1.5b.txt"
for shape in ${SHAPES:-0.5b 1.5b}; do
    "$PYTHON" -m benchmarks.core --shape "$shape" --dtype "${DTYPE:-bfloat16}" --out "$OUT/core-$shape-gpu.json" 2>&1 |
        tee "$OUT/core-$shape.txt"
done
(cd GRPO && "$PYTHON" grpo.py --preset cpu --num_steps 20 --output_dir "$OUT/embedded" --no_progress)
