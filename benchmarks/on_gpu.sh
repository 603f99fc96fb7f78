#!/usr/bin/env bash
# What needs a GPU, in one go: correctness first, then figures at Qwen3-8B shapes with random weights.
#
#   bash benchmarks/on_gpu.sh NAME PEAK_TFLOPS [OUT]      bash benchmarks/on_gpu.sh h200 790
#
# NAME goes into the file names, PEAK_TFLOPS is the device's dense bf16 rate (for the share of it that is reached), OUT
# is benchmarks/ unless given. A part that fails does not stop the others; the status says whether one did. PYTHON
# chooses the interpreter. About 18 GB of GPU memory for the weights, more for 8192 tokens.
set -uo pipefail
if [ $# -lt 2 ]; then
  sed -n '4p;6,8p' "$0" >&2
  exit 2
fi
name=$1 peak=$2 out=${3:-benchmarks}
python=${PYTHON:-python}
cd "$(dirname "$0")/.." && mkdir -p "$out" || exit 1
failed=()

part() {  # name, command: its output in OUT/name.log, too
  echo "== $1: ${*:2}"
  "${@:2}" 2>&1 | tee "$out/$1.log"
  [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$1")
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "on_gpu.sh: $python sees no CUDA device. Run it where there is one, or choose another PYTHON." >&2
  exit 1
fi
part gpu_tests "$python" -m pytest -q -p no:xdist tests/equivalence/test_static.py
for tokens in 512 2048 8192; do
  part "train_step_$tokens" "$python" benchmarks/train_step.py --case cuda --shape qwen3-8b --sequence "$tokens" \
    --steps 5 --peak-tflops "$peak" --out "$out/train_step_qwen3-8b_${tokens}_$name"
done
part decode_shapes "$python" benchmarks/decode_shapes.py --shape qwen3-8b --device cuda --out "$out/decode_qwen3-8b_$name"
if [ ${#failed[@]} -gt 0 ]; then
  echo "on_gpu.sh: failed: ${failed[*]}; their logs are in $out." >&2
  exit 1
fi
