#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, the operators' tests on the
# device, compute-sanitizer, benchmarks.  Under 20 minutes in all on one GPU.
#
#   bench/gpu.sh [--dry-run] [--seconds N] [build] [test] [sanitize] [bench]   default: all four
#
# What comes of it lies in $OUT (default: bench/results/gpu) from each step's end on, in two
# files: summary.txt, and gpu.tar.gz with the tables and every step's log ($LOGS).  With --seconds it ends
# within N seconds: a step but the build is cut off there, later ones are left out and named.
# Where a command may take ten minutes: `--seconds 570 build test bench`, then `--seconds 570
# sanitize`.  Needs an environment with a CUDA build of torch, nvcc, cmake, ninja, pybind11, pytest,
# hypothesis and, for two of the tables, transformers ($PYTHON, default python3); nothing is
# fetched.  --dry-run does on the CPU what can be done there, to see that the script itself works.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
LOGS=${LOGS:-build/gpu-logs}
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
touch "$LOGS/started" "$LOGS/failed.txt"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE

say() { echo "$@" | tee -a "$LOGS/summary.txt"; }

# What there is so far, to $OUT.
hand_out() {
  local kind=cuda table
  [ "$DEVICE" = cpu ] && kind=quick
  for table in bench/results/{kernels,trie,sage,prefix,pairwise-t5,decode,tokenizer}-$kind.*; do
    [ "$table" -nt "$LOGS/started" ] && cp "$table" "$LOGS"
  done
  cp "$LOGS/summary.txt" "$OUT"
  tar -czf "$OUT/gpu.tar.gz" -C "$LOGS" .
}

# run_step NAME COMMAND...: runs it with a log of its own; a failure is noted for the end.
run_step() {
  local name=$1 start=$SECONDS cut=()
  shift
  if [ -n "$LIMIT" ]; then
    local left=$((LIMIT - SECONDS - 5))
    if [ "$left" -lt 10 ]; then
      say "== $name: left out, no time"
      echo "$name" >>"$LOGS/failed.txt"
      return
    fi
    cut=(timeout -k 5 "$left")
  fi
  say "== $name: $*"
  # A function of this file is for this shell; whatever else it may be cut off.
  [ "$(type -t "$1")" = function ] && cut=()
  if ${cut[@]+"${cut[@]}"} "$@" >"$LOGS/$name.log" 2>&1; then
    say "   $name ok, $((SECONDS - start)) s: $(tail -n 1 "$LOGS/$name.log")"
  else
    say "   $name FAILED, $((SECONDS - start)) s"
    tail -n 25 "$LOGS/$name.log"
    echo "$name" >>"$LOGS/failed.txt"
  fi
}

step() {
  run_step "$@"
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

tests=()
for name in policy prefix head tokenizer_ops trie sampling filters candidates trie_live torch_features bilevel cuda_device cuda_models; do
  tests+=("python_tests/test_$name.py")
done
suite=("$PYTHON" -m pytest -q -p no:cacheprovider --device "$DEVICE")
# Several processes share the device where pytest-xdist is there.
several=()
"$PYTHON" -c "import xdist" 2>/dev/null && several=(-n $(($(nproc) < 8 ? $(nproc) : 8)))
# Small shapes, every kernel, every path; each sanitizer slows them ten to a hundred times.
small="many_codewords or column_that_nobody or every_optional_term or special_values or empty or impossible or inplace_gradient_equals or token_outside or every_path"
small+=" or wide_fan_out or fewer_continuations or beam_aware or masked_softmax or long_rows or strided or forbidden_items or pairwise_of_log"
# A capture needs torch's caching allocator, which is off there.
small="($small) and not capture"
fewest="(every_path or wide_fan_out or fewer_continuations or beam_aware_counts) and not capture"

# judged LOG COMMAND...: as the command ends, and not if in its log a kernel of ours read memory that
# nothing had written.  The tool must look at all kernels, since it counts what those it does not
# look at write as unwritten; the others' own reads are theirs.
cat >"$LOGS/judged" <<'EOF'
log=$1
shift
"$@" >"$log" 2>&1
code=$?
grep -v '^=========' "$log" | tail -n 25
ours=$(awk '/Uninitialized/ { line = NR + 1 } NR == line && /genrec::/' "$log")
[ -z "$ours" ] || sort <<<"$ours" | uniq -c | sort -rn | head -n 20
echo "$(grep -c . <<<"$ours") reports of a genrec kernel, $(grep -c Uninitialized "$log") in all; exit $code"
[ "$code" -eq 0 ] && [ -z "$ours" ]
EOF

for stage in "${stages[@]}"; do
  case "$stage" in
    build)
      step build build
      step info "$PYTHON" -m genrec_ext info
      command -v nvidia-smi >/dev/null && step device nvidia-smi
      ;;
    test) step test "${suite[@]}" ${several[@]+"${several[@]}"} "${tests[@]}" ;;
    sanitize)
      if [ "$DEVICE" = cpu ]; then
        echo "== sanitize: compute-sanitizer needs a GPU; the same tests without it"
        step small "${suite[@]}" "${tests[@]}" -k "$small"
        continue
      fi
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that each tensor has bounds of its own
      for tool in memcheck racecheck synccheck; do # beside each other
        run_step "$tool" timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          --kernel-name kns=genrec --print-limit 20 "${suite[@]}" "${tests[@]}" -k "$small" &
      done
      run_step initcheck bash "$LOGS/judged" "$LOGS/initcheck-all.log" \
        timeout 300 compute-sanitizer --tool initcheck --print-limit 100000 \
        "${suite[@]}" "${tests[@]}" -k "$fewest" &
      wait
      hand_out
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
      ;;
    bench)
      if [ "$DEVICE" = cpu ]; then
        how=(--quick) # git ignores their tables
      else
        how=(--device cuda)
      fi
      # What matters most first, where time is short.
      [ "$DEVICE" = cpu ] || step kernels "$PYTHON" bench/kernels_cuda.py
      step bench_trie "$PYTHON" bench/bench_trie.py step "${how[@]}"
      step bench_sage "$PYTHON" bench/bench_sage.py "${how[@]}"
      step bench_prefix "$PYTHON" bench/bench_prefix.py "${how[@]}"
      step pairwise_t5 "$PYTHON" bench/pairwise_t5.py "${how[@]}" --batches 16 64 --repeats 9
      step bench_decode "$PYTHON" bench/bench_decode.py "${how[@]}"
      step bench_tokenizer "$PYTHON" bench/bench_tokenizer.py "${how[@]}"
      ;;
  esac
done
failed=$(sort "$LOGS/failed.txt" | tr '\n' ' ')
say "== failed or left out: ${failed:-none}"
hand_out
[ -z "$failed" ]
