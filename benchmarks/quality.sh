#!/usr/bin/env bash
# The tables of quality on one GPU, trials side by side: some minutes instead of the hours that a CPU takes.
#
#   benchmarks/quality.sh FOLDER [structured pat ast oneshot memory]
#
# FOLDER gets summary.txt, a log for each step, csv and picture of what is finished, and records.tgz: the records of all
# trials, from which the scripts' --collect makes the tables again, and --speed on another machine adds speeds. What one
# call did not finish, the next one goes on with; a step alone takes the name of it. The steps of most value come first.
# Steps of training: STRUCTURED_STEPS, PAT_STEPS, AST_STEPS. Seconds of a step: SECONDS_structured and so on. JOBS: 13, of
# 5 GB each (one of LLM-Pruner 8). With CUDA's multi-process service (nvidia-cuda-mps-control -d) before it the trials do
# not take turns on the GPU: an H100 and 16 cores then took 10 minutes for structured and pat, of which 2 to start.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/quality.sh FOLDER [structured pat ast oneshot memory]}
shift
wanted=${*:-structured pat ast oneshot memory}
python=${PYTHON:-python3}
runs=runs/quality
jobs=${JOBS:-13}
failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$out" "$runs"
out=$(cd "$out" && pwd)

# step NAME SECONDS COMMAND...: at its limit a step stops its trials, which write checkpoints, and keeps what is finished.
step() {
  local name=$1 variable=SECONDS_$1 start=$SECONDS status
  local seconds=${!variable:-$2}
  shift 2
  [[ " model $wanted " == *" $name "* ]] || return 0
  timeout --kill-after=30 "$seconds" "$@" >>"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  echo "$((SECONDS - start)) s of $seconds, exit $status: $*" | tee -a "$out/summary.txt"
  [ $status -eq 0 ] || tail -n 25 "$out/$name.log"
}

# Checkpoints are written only where a step is stopped.
common=(--model "$runs/dense" --jobs "$jobs")
tuned=(--save-every 0 --batch-size 4 --window 512 --eval-window 2048)
methods=(lora llm-pruner slicegpt loraprune slimgpt pat-identity pat-learned)
[ -d "$runs/dense" ] || step model 60 "$python" -c "from pyprune import data; data.demo_model('$runs/dense')"
step structured 420 "$python" benchmarks/structured_quality.py "${common[@]}" "${tuned[@]}" --out "$runs/structured" \
  --steps "${STRUCTURED_STEPS:-100}" --warmup 10 --dtype bfloat16 --methods "${methods[@]}"
step pat 240 "$python" benchmarks/pat_quality.py "${common[@]}" "${tuned[@]}" --out "$runs/pat" \
  --steps "${PAT_STEPS:-300}" --warmup 10 --dtype bfloat16
step ast 55 "$python" benchmarks/ast_quality.py "${common[@]}" "${tuned[@]}" --out "$runs/ast" \
  --steps "${AST_STEPS:-100}" --warmup 10 --points 4
step oneshot 60 "$python" benchmarks/oneshot_quality.py "${common[@]}" --out "$runs/oneshot" --keep device
step memory 30 "$python" benchmarks/structured_memory.py --blocks 22 --jobs 4 --save

cp benchmarks/{structured,pat,ast,oneshot}_quality.{csv,png} benchmarks/results.csv "$out" 2>/dev/null
find "$runs" -regextype posix-extended -not -path '*/dense/*' \
  -regex '.*/(summary|config|record|curve|dense)\.json|.*/metrics\.jsonl|.*/protocol\.txt|.*/oneshot/[^/]*\.json|.*/logs/.*|.*/stages/.*' \
  -print0 | tar -czf "$out/records.tgz" --null --files-from=-
exit $failed
