#!/usr/bin/env bash
# All that needs a GPU in one call: builds, runs the tests, measures, and runs what is marked under compute-sanitizer.
#
#   tests/gpu/check.sh [FOLDER]       FOLDER (runs/gpu-check) gets summary.txt, a log for each step, and the figures
#
# Needs torch with CUDA, nvcc, ninja, pybind11 and pytest, and no network. A step that fails or runs out of its time does
# not stop the others; the exit status is the number of such steps. The time limits add up to nine minutes.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu-check}
python=${PYTHON:-python3}
mkdir -p "$out"
: >"$out/summary.txt"
failed=0
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: appends to NAME.log and to the summary.
step() {
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  echo "+ $*" >>"$out/$name.log"
  timeout --kill-after=5 "$seconds" "$@" >>"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  echo "$((SECONDS - start)) s of $seconds, exit $status: $*" | tee -a "$out/summary.txt"
  grep -E "[0-9]+ (passed|skipped|failed|error)|ERROR SUMMARY" "$out/$name.log" | tail -n 1 | tee -a "$out/summary.txt"
}

arch=$($python -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())).replace("90", "90a"))')
export PYPRUNE_CUDA=1 PYPRUNE_CUDA_ARCHS=${PYPRUNE_CUDA_ARCHS:-$arch}
rm -f "$out"/*.log
step build 120 $python setup.py -q build_ext --inplace
step build 15 $python -m pyprune info
step tests 130 $python -m pytest -q -m gpu tests/gpu
step benchmarks 50 $python benchmarks/bench_hsm.py --device cuda --dtypes bfloat16 --save
step benchmarks 40 $python benchmarks/bench_hsm.py --device cuda --dtypes bfloat16 --tokens 16384 --save
step benchmarks 15 $python benchmarks/bench_lora_score.py --device cuda --save
step benchmarks 40 $python benchmarks/tune_sparse_gemm.py --save
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # a tensor is an allocation then, whose end the sanitizer knows
for tool in memcheck racecheck initcheck synccheck; do
  step sanitizer 32 compute-sanitizer --tool $tool --error-exitcode 9 $python -m pytest -q -x -m sanitizer tests/gpu \
    -k "bfloat16 or test_cp_async or test_ldmatrix"
done
cp benchmarks/results.csv pyprune/_cuda/sparse_gemm.json "$out"
exit $failed
