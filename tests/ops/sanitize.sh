#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds them apart from the installed ones, and runs
# the tests of the packed weights and of hsm on them. A wild read or write, or undefined behaviour, ends the run.
#
#   tests/ops/sanitize.sh [pytest arguments]        PYTHON=.venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
compiler=$(command -v "${CXX:-g++}")
build=$PWD/build/sanitize
mkdir -p "$build"

printf '#!/bin/sh\nexec "%s" "$@" -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1\n' \
  "$compiler" > "$build/cxx"
chmod +x "$build/cxx"
CXX=$build/cxx PYPRUNE_CUDA=0 "$python" setup.py -q build --build-base "$build" --build-lib "$build/lib" > "$build/log" 2>&1 ||
  { tail -n 40 "$build/log"; exit 1; }

export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
# torch and Python keep memory until the end, and torch's own libraries are not instrumented.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$build/lib PYTHONMALLOC=malloc OMP_NUM_THREADS=2
(cd / && "$python" -c 'import pyprune; assert "sanitize" in pyprune.__file__, pyprune.__file__')
[ $# -gt 0 ] || set -- tests/ops
# -s: a report is the last thing that the process says, and nobody would show what was captured.
"$(dirname "$python")/pytest" -q -s -p no:cacheprovider -k "not compile and not opcheck" "$@"
