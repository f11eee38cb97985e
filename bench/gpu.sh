#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, the operators' tests on the
# device, compute-sanitizer, benchmarks.  Under 20 minutes in all on one GPU.
#
#   bench/gpu.sh [--dry-run] [build] [test] [sanitize] [bench]     default: all four
#
# Logs, tables and pictures go to $OUT (default: bench/results/gpu).  Needs an
# environment with a CUDA build of torch, nvcc, cmake, ninja, pybind11, pytest and
# hypothesis ($PYTHON, default python3); nothing is fetched.  --dry-run does on the
# CPU what can be done there, to see that the script itself works.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
DEVICE=cuda
stages=()
for word in "$@"; do
  case "$word" in
    --dry-run) DEVICE=cpu ;;
    build | test | sanitize | bench) stages+=("$word") ;;
    *) echo "gpu.sh: unknown word $word" >&2; exit 2 ;;
  esac
done
[ ${#stages[@]} -eq 0 ] && stages=(build test sanitize bench)
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
failed=()

# step NAME COMMAND...: runs it with a log of its own; a failure is kept for the end.
step() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name: $*"
  if "$@" >"$OUT/$name.log" 2>&1; then
    echo "   ok, $((SECONDS - start)) s: $(tail -n 1 "$OUT/$name.log")"
  else
    echo "   FAILED, $((SECONDS - start)) s"
    tail -n 25 "$OUT/$name.log"
    failed+=("$name")
  fi
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
        cp bench/results/{sage,prefix,tokenizer,trie}-cuda.* "$OUT"/ 2>/dev/null
      fi
      ;;
  esac
done
echo "== ${#failed[@]} of the steps failed${failed[*]:+: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
