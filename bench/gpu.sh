#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, the operators' tests on the
# device, compute-sanitizer, benchmarks.  Under 20 minutes in all on one GPU.
#
#   bench/gpu.sh [--dry-run] [--seconds N] [build] [test] [sanitize] [bench]   default: all four
#
# What comes of it lies in $OUT (default: bench/results/gpu) from each step's end on, a few
# files in all: summary.txt, the tables, and everything in gpu.tar.gz.  With --seconds it ends
# within N seconds: a step but the build is cut off there, later ones are left out and named.
# Where a command may take ten minutes: `--seconds 570 build test bench`, then `--seconds 570
# sanitize`.  Needs an environment with a CUDA build of torch, nvcc, cmake, ninja, pybind11, pytest
# and hypothesis ($PYTHON, default python3); nothing is fetched.  --dry-run does on the CPU what
# can be done there, to see that the script itself works.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
LOGS=build/gpu-logs
DEVICE=cuda
LIMIT=
stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DEVICE=cpu ;;
    --seconds)
      LIMIT=${2:-}
      [[ "$LIMIT" =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: --seconds takes a number, got '$LIMIT'" >&2; exit 2; }
      shift
      ;;
    build | test | sanitize | bench) stages+=("$1") ;;
    *) echo "gpu.sh: unknown word $1" >&2; exit 2 ;;
  esac
  shift
done
[ ${#stages[@]} -eq 0 ] && stages=(build test sanitize bench)
rm -rf "$LOGS"
mkdir -p "$OUT" "$LOGS"
: >"$LOGS/summary.txt"
touch "$LOGS/started"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
failed=()

say() { echo "$@" | tee -a "$LOGS/summary.txt"; }

# What there is so far, to $OUT.
hand_out() {
  local kind=cuda table
  [ "$DEVICE" = cpu ] && kind=quick
  for table in bench/results/{sage,prefix,tokenizer,trie}-$kind.*; do
    [ "$table" -nt "$LOGS/started" ] && cp "$table" "$LOGS"
  done
  cp "$LOGS"/*-$kind.md "$LOGS/summary.txt" "$OUT" 2>/dev/null
  tar -czf "$OUT/gpu.tar.gz" -C "$LOGS" .
}

# step NAME COMMAND...: runs it with a log of its own; a failure is kept for the end.
step() {
  local name=$1 start=$SECONDS cut=()
  shift
  if [ -n "$LIMIT" ]; then
    local left=$((LIMIT - SECONDS - 5))
    if [ "$left" -lt 10 ]; then
      say "== $name: left out, no time"
      failed+=("$name")
      return
    fi
    cut=(timeout -k 5 "$left")
  fi
  say "== $name: $*"
  # A function of this file is for this shell; whatever else it may be cut off.
  [ "$(type -t "$1")" = function ] && cut=()
  if ${cut[@]+"${cut[@]}"} "$@" >"$LOGS/$name.log" 2>&1; then
    say "   ok, $((SECONDS - start)) s: $(tail -n 1 "$LOGS/$name.log")"
  else
    say "   FAILED, $((SECONDS - start)) s"
    tail -n 25 "$LOGS/$name.log"
    failed+=("$name")
  fi
  hand_out
}

build() {
  local torch version arch
  torch=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || return 1
  version=$("$PYTHON" -c 'import torch; print(torch.__version__)') || return 1
  command -v nvcc || { echo "nvcc is not on PATH"; return 1; }
  # The GPU's own architecture; 9.0 where there is none to ask.
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
  cmake -S . -B build/gpu -GNinja -DCMAKE_BUILD_TYPE=Release -DGENREC_CUDA=ON \
    -DCMAKE_CUDA_COMPILER="$(command -v nvcc)" -DCMAKE_CUDA_ARCHITECTURES="${GENREC_CUDA_ARCHS:-${arch:-90}-real}" \
    -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
    -DGENREC_TORCH_DIR="$torch" -DGENREC_TORCH_VERSION="$version" \
    -DGENREC_VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' genrec_ext/_version.py)" &&
    cmake --build build/gpu || return 1
  rm -f genrec_ext/*.so # never written over in place: whoever has one loaded would crash
  cp build/gpu/*.so genrec_ext/
}

tests=(python_tests/test_policy.py python_tests/test_prefix.py python_tests/test_head.py python_tests/test_tokenizer_ops.py python_tests/test_trie.py python_tests/test_sampling.py python_tests/test_cuda_device.py)
suite=("$PYTHON" -m pytest -q -p no:cacheprovider --device "$DEVICE")
# Small shapes, every kernel, every path; each sanitizer slows them ten to a hundred times.
small="many_codewords or column_that_nobody or every_optional_term or special_values or empty or impossible or inplace_gradient_equals or token_outside or every_path"

for stage in "${stages[@]}"; do
  case "$stage" in
    build)
      step build build
      step info "$PYTHON" -m genrec_ext info
      command -v nvidia-smi >/dev/null && step device nvidia-smi
      ;;
    test) step test "${suite[@]}" "${tests[@]}" ;;
    sanitize)
      if [ "$DEVICE" = cpu ]; then
        echo "== sanitize: compute-sanitizer needs a GPU; the same tests without it"
        step small "${suite[@]}" "${tests[@]}" -k "$small"
        continue
      fi
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that each tensor has bounds of its own
      for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          --kernel-name kns=genrec --print-limit 20 "${suite[@]}" "${tests[@]}" -k "$small"
      done
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
      ;;
    bench)
      if [ "$DEVICE" = cpu ]; then
        # git ignores their tables
        step bench_sage "$PYTHON" bench/bench_sage.py --quick
        step bench_prefix "$PYTHON" bench/bench_prefix.py --quick
        step bench_tokenizer "$PYTHON" bench/bench_tokenizer.py --quick
        step bench_trie "$PYTHON" bench/bench_trie.py step --quick
      else
        step bench_sage "$PYTHON" bench/bench_sage.py --device cuda
        step bench_prefix "$PYTHON" bench/bench_prefix.py --device cuda
        step bench_tokenizer "$PYTHON" bench/bench_tokenizer.py --device cuda
        step bench_trie "$PYTHON" bench/bench_trie.py step --device cuda
      fi
      ;;
  esac
done
say "== ${#failed[@]} of the steps failed or were left out${failed[*]:+: ${failed[*]}}"
hand_out
[ ${#failed[@]} -eq 0 ]
