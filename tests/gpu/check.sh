#!/usr/bin/env bash
# All that needs a GPU in one call: builds, runs the tests and what is marked under compute-sanitizer, then measures.
#
#   tests/gpu/check.sh [FOLDER]       FOLDER (runs/gpu-check) gets summary.txt, a log for each step, and the figures
#
# Needs a GPU, torch with CUDA, nvcc, compute-sanitizer, ninja, pybind11 and pytest (with pytest-xdist the tests share
# the GPU, which is faster), and no network. Tests and sanitizers run side by side; benchmarks and the profiler have the
# GPU to themselves. A step that fails or runs out of its time does not stop the others, nor do tests of which none ran;
# the exit status is the number of such steps, or 2 where nothing was begun because something is missing. The time
# limits of what runs one after the other add up to 525 seconds.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh check.sh` may be another shell
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu-check}
python=${PYTHON:-python3}
PATH=${CUDA_HOME:+$CUDA_HOME/bin:}${CUDA_PATH:+$CUDA_PATH/bin:}$PATH # where setup.py looks first

# need MESSAGE COMMAND...: the message, unless the command succeeds.
lacking=
need() {
  local message=$1
  shift
  "$@" >/dev/null 2>&1 && return
  echo "tests/gpu/check.sh: $message" >&2
  lacking=yes
}
need "no GPU: $python has no torch that sees a CUDA device; go where there is one, or name its Python by PYTHON" \
  $python -c 'import torch; torch.zeros(1, device="cuda")'
need "no nvcc: setup.py compiles the kernels with it; install the CUDA toolkit and put its bin folder on PATH" \
  command -v nvcc
need "no compute-sanitizer: tests run under it; install the CUDA toolkit and put its bin folder on PATH" \
  command -v compute-sanitizer
[[ -z $lacking ]] || exit 2

mkdir -p "$out"
rm -f "$out"/*.log
: >"$out/summary.txt"
failed=0
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# step NAME SECONDS COMMAND...: appends to NAME.log and to the summary.
step() {
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  echo "+ $*" >>"$out/$name.log"
  timeout --kill-after=5 "$seconds" "$@" >>"$out/$name.log" 2>&1
  status=$?
  if [[ $status == 0 ]] && grep -qE "^[0-9]+ skipped" "$out/$name.log"; then # nothing passed, which proves nothing
    status="1 (no test ran)"
  fi
  {
    echo "$((SECONDS - start)) s of $seconds, exit $status: $*"
    grep -E "[0-9]+ (passed|skipped|failed|error)|ERROR SUMMARY" "$out/$name.log" | tail -n 1
  } | tee -a "$out/summary.txt"
  return "${status%% *}"
}

# beside NAME SECONDS COMMAND...: a step in the background; `join` waits for all of them.
running=()
beside() {
  step "$@" &
  running+=($!)
}
join() {
  for job in "${running[@]}"; do wait "$job" || failed=$((failed + 1)); done
  running=()
}

arch=$($python -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())).replace("90", "90a"))')
# lines of the source in what the sanitizer and the profiler say
export NVCC_APPEND_FLAGS=-lineinfo
export PYPRUNE_CUDA=1 PYPRUNE_CUDA_ARCHS=${PYPRUNE_CUDA_ARCHS:-$arch}
step build 35 $python setup.py -q build_ext --inplace || failed=$((failed + 1))
step info 10 $python -m pyprune info || failed=$((failed + 1))

parallel=$($python -c 'import xdist' 2>/dev/null && echo "-n 6")
pytest="$python -m pytest -q --continue-on-collection-errors"
beside tests 110 $pytest $parallel -m gpu tests/gpu
for tool in memcheck racecheck initcheck synccheck; do
  # with no caching a tensor is an allocation, whose end the sanitizer knows
  beside $tool 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
    $pytest -m sanitizer tests/gpu -k "bfloat16 or slab or test_cp_async or test_ldmatrix"
done
join

tokens="1 8 16 32 64 256 2048 16384"
for command in \
  "tune 45 benchmarks/tune_sparse_gemm.py --rounds 3 --save" \
  "bench_ops 70 benchmarks/bench_ops.py --device cuda --without compile --budget 0.8 --tokens $tokens --save" \
  "bench_serving 100 benchmarks/bench_serving.py --device cuda --rounds 5 --save" \
  "bench_hsm 30 benchmarks/bench_hsm.py --device cuda --no-compile --dtypes bfloat16 --tokens 2048 16384 --save"; do
  read -r name seconds arguments <<<"$command"
  step $name $seconds $python $arguments || failed=$((failed + 1))
done
# whole training steps, in one process, which imports transformers once; one that fails does not stop the others
steps="--device cuda --shapes llama-2048 --layers 8 --rounds 3 --save"
step scenarios 50 env PYTHONPATH="benchmarks:$PYTHONPATH" $python - \
  "benchmarks/bench_pat_step.py --bases learned --no-memory $steps" "benchmarks/bench_ast_step.py --parts step $steps" \
  "benchmarks/bench_loraprune_step.py $steps" "benchmarks/bench_tune_step.py $steps" <<'END' || failed=$((failed + 1))
import runpy, sys, traceback

failed = []
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        failed.append(sys.argv[0])
sys.exit(f"failed: {' '.join(failed)}" if failed else 0)
END
if command -v ncu >/dev/null; then
  step profile 75 ncu --clock-control none --profile-from-start off --kernel-name-base demangled -k regex:pyprune \
    --csv --page details --section SpeedOfLight --section Occupancy --section WarpStateStats --section LaunchStats \
    --log-file "$out/profile.csv" $python benchmarks/profile_ops.py || failed=$((failed + 1))
fi
cp benchmarks/results.csv pyprune/_cuda/sparse_gemm.json "$out"
exit $failed
