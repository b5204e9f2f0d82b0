#!/usr/bin/env bash
# Everything that needs a GPU, in less than eight minutes and without network: build, tests,
# benchmark, plots, compute-sanitizer, instruction counts. Results go to bench/results.
#
#   bench/run_gpu.sh [--dry-run] [--no-build] [--output FOLDER]
#
# --dry-run   without a GPU: builds, collects the tests, and runs the benchmark on the CPU, tiny
# --no-build  takes the library that is there
#
# Every step has a time limit of its own, within that of the whole; one that fails does not keep the
# later ones from running. Exit status 1 if one failed. What is not installed is left out, with a
# note. PYTHON names the interpreter (default .venv/bin/python if there is one, else python3).
set -uo pipefail
cd "$(dirname "$0")/.."

TOTAL_SECONDS=${TOTAL_SECONDS:-470}
dry_run=0 build=1 output=bench/results
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --no-build) build=0 ;;
    --output) output=${2:?--output needs a folder}; shift ;;
    *) echo "usage: bench/run_gpu.sh [--dry-run] [--no-build] [--output FOLDER]" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$output"

summary=() failed=0

# step NAME SECONDS COMMAND...: runs a command with a time limit, and notes how it ended.
step() {
  local name=$1 limit=$2 begin=$SECONDS status verdict
  shift 2
  local left=$((TOTAL_SECONDS - SECONDS))
  if [ "$left" -lt 5 ]; then
    summary+=("LEFT OUT  $name: no time left")
    failed=1
    return 1
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  printf '\n=== %s (at most %s s)\n' "$name" "$limit"
  timeout --kill-after=5 "$limit" "$@"
  status=$?
  case $status in
    0) verdict="ok       " ;;
    124 | 137) verdict="TIMED OUT" failed=1 ;;
    *) verdict="FAILED   " failed=1 ;;
  esac
  summary+=("$verdict $name: $((SECONDS - begin)) s, exit status $status")
  return "$status"
}

# skip NAME REASON: notes what is left out.
skip() {
  printf '\n=== %s: left out, %s\n' "$1" "$2"
  summary+=("left out  $1: $2")
}

has_module() {
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

# Python's `torch` finds the compilers of the CUDA toolkit only where they are on PATH.
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin"; do
  if [ -d "$folder" ]; then PATH=$PATH:$folder; fi
done

step "machine" 60 "$PYTHON" - <<'PYTHON_CODE'
import platform, shutil, subprocess, torch
print("python", platform.python_version(), "torch", torch.__version__)
print("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
for command in (["nvcc", "--version"], ["nvidia-smi"]):
    if shutil.which(command[0]):
        print(subprocess.run(command, capture_output=True, text=True).stdout.strip())
PYTHON_CODE

if [ "$build" = 0 ]; then
  skip "build" "--no-build"
elif [ "$dry_run" = 1 ]; then
  step "build" 400 "$PYTHON" setup.py -q build_ext --inplace
else
  step "build" 200 env MLLOSS_NATIVE=require MLLOSS_CUDA=1 \
    "$PYTHON" setup.py -q build_ext --inplace
fi
step "what was built" 60 "$PYTHON" -m mlloss_cuda

# Of the tests, those on the GPU. Several processes share it, where pytest-xdist is there.
workers=()
if has_module xdist; then workers=(-n 6); fi
if ! has_module pytest || ! has_module hypothesis; then
  skip "tests" "pytest or hypothesis is not installed"
elif [ "$dry_run" = 1 ]; then
  step "tests, only collected" 120 \
    "$PYTHON" -m pytest -qq -m cuda --collect-only tests/test_support.py
else
  step "tests" 120 env MLLOSS_NATIVE=require "$PYTHON" -m pytest -q -m cuda "${workers[@]}" tests
fi

# What follows the benchmark gets what it leaves.
bench_seconds=$((TOTAL_SECONDS - SECONDS - 260))
if [ "$dry_run" = 1 ]; then
  step "benchmark, tiny" 120 "$PYTHON" bench/gpu.py --device cpu --tiny --no-compile \
    --losses sigmoid focal --dtypes bf16 --output "$output"
else
  step "benchmark" $((bench_seconds + 25)) \
    "$PYTHON" bench/gpu.py --seconds "$bench_seconds" --output "$output"
fi

# The head: labels, features and batch of two data sets.
if [ "$dry_run" = 1 ]; then
  step "head, tiny" 60 "$PYTHON" bench/head.py --labels 3000 --features 8 --rows 4 --rounds 2 \
    --only "bare products, whole" ExtremeLinear --output "$output/head.json"
else
  step "head, shape of Amazon-670K" 90 "$PYTHON" bench/head.py --device cuda --preset amazon-670k \
    --dtype bf16 --output "$output/head-670k.json"
  step "head, shape of Amazon-3M" 40 "$PYTHON" bench/head.py --device cuda --preset amazon-3m \
    --dtype bf16 --only "bare products, whole" "bare products, in parts" ExtremeLinear \
    "dense, this loss" --output "$output/head-3m.json"
fi

newest=$(ls -t "$output"/gpu-*.json 2>/dev/null | head -n 1)
if [ -z "$newest" ]; then
  skip "plots" "there are no results"
elif ! has_module matplotlib; then
  skip "plots" "matplotlib is not installed"
else
  step "plots" 30 "$PYTHON" bench/plots.py "$newest" --output "$output"
fi

sanitizer=$(command -v compute-sanitizer || true)
if [ "$dry_run" = 1 ]; then
  skip "compute-sanitizer" "--dry-run"
elif [ -z "$sanitizer" ] || ! has_module pytest; then
  skip "compute-sanitizer" "it or pytest is not installed"
else
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" 45 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" bench/sanitized.py
  done
fi

if [ -f build/in_place/cuda/_C.abi3.so ]; then
  if [ "$dry_run" = 1 ]; then
    step "instruction counts, only of a small kernel" 60 \
      "$PYTHON" bench/instructions.py --kernels "finish_reduction<float>"
  else
    step "instruction counts" 60 bash -o pipefail -c \
      '"$0" bench/instructions.py --markdown | tee "$1"' "$PYTHON" "$output/instructions.md"
  fi
else
  skip "instruction counts" "there is no library with CUDA kernels"
fi

printf '\n=== summary, %s s\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit "$failed"
