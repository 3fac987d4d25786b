#!/usr/bin/env bash
# Does all that needs a GPU, in one go and in under nine minutes: builds, tests, watches, measures.
#
#   benchmarks/gpu_check.sh [DIR] [PART...]      --list names the parts, --dry-run runs none
#
# DIR (default: benchmarks/results/<name of the GPU>) gets log.txt with everything, summary.json,
# bench.json, bench.png and table.md, and what the parts that were asked for make: tune.json, and
# networks.json, sizes.json and calls.json, of network.py, scaling.py and overhead.py, with pictures.
# Every part has a verdict: ok, FAILED, or "not available" with the reason; a part that fails does not
# keep the next from running. The exit status is 0 if none failed. Settings of the card are read and never changed.
#
#   PYTHON=python3                the Python with torch; needs pytest, ninja, pybind11
#   ECA_FUSED_GPU_SECONDS=480     when no more part is started; a part under way ends soon after
#   ECA_FUSED_COMMIT=...          the commit for the results, where there is no .git
#
# shellcheck disable=SC2329  # the parts are called by their names
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$PWD
cd "$root" || exit 2
python=${PYTHON:-python3}
budget=${ECA_FUSED_GPU_SECONDS:-480}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

usual_parts=(build tests plans determinism graphs devices triton sanitizer profile bench)
# These take minutes: only where they are asked for.
all_parts=("${usual_parts[@]}" tune compile networks sizes calls)

common_tests=()
for test in kernels values layouts gradients fuzz errors layer operators out sensitivity \
  transforms memory mixed_precision instruments; do
  common_tests+=("tests/test_$test.py")
done

# The comment at the top of this file.
usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# ---- what the parts use ----

left() { echo $((budget - SECONDS)); }

# limited SECONDS COMMAND...: with a limit, and never far beyond the whole budget
limited() {
  limit=$1
  shift
  rest=$(($(left) + 15))
  [ "$rest" -ge 20 ] || rest=20
  [ "$limit" -le "$rest" ] || limit=$rest
  printf '+ timeout %s %s\n' "$limit" "$*" >&2
  timeout -k 10 "$limit" "$@"
}

# The last of these lines is the verdict of a part.
verdict() { printf '\nVERDICT %s\n' "$*"; }

has_module() { "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))"; }

has_kernels() {
  "$python" -c 'import sys, eca_fused.native as n; sys.exit("cuda" not in n.devices)' 2>/dev/null
}

# pytest_part SECONDS WORKERS ARGUMENTS...: the tests on the GPU, and their verdict
pytest_part() {
  seconds=$1 workers=$2
  shift 2
  set -- -q -p no:cacheprovider --tb=short "$@"
  # A worker that breaks its CUDA context dies, and another one goes on.
  if has_module xdist; then set -- -n "$workers" --max-worker-restart=30 "$@"; fi
  if has_module pytest_timeout; then set -- --timeout=100 --timeout-method=thread "$@"; fi
  ECA_FUSED_TEST_DEVICE=cuda limited "$seconds" "$python" -m pytest "$@" >"$work/pytest" 2>&1
  status=$?
  cat "$work/pytest"
  counts=$(grep -E '(passed|failed|error|skipped|deselected).* in [0-9.]+' "$work/pytest" | tail -n 1)
  counts=${counts//=/}
  case $status in
    0) verdict "ok: $counts" ;;
    5) verdict "not available: no test was selected" ;;
    124 | 137) verdict "FAILED: not done in $limit s; $(tail -n 1 "$work/pytest")" ;;
    *)
      printf '\nDETAILS\n'
      grep -E '^(FAILED|ERROR) ' "$work/pytest" | cut -c1-200 | head -n 12
      verdict "FAILED: ${counts:-pytest ended with status $status}"
      ;;
  esac
}

# ---- parts ----

part_build() {
  capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') ||
    { verdict "FAILED: torch sees no GPU"; return; }
  export TORCH_CUDA_ARCH_LIST=$capability ECA_FUSED_CUDA=1
  limited 300 "$python" setup.py build_ext --inplace
  status=$?
  if [ "$status" -ne 0 ]; then verdict "FAILED: setup.py ended with status $status"
  elif has_kernels; then
    verdict "ok: $("$python" -c 'from eca_fused import backends as b; print(b()["native"].detail)')," \
      "for $capability"
  else
    "$python" -c 'import eca_fused; print(eca_fused.backends()["native"])'
    verdict "FAILED: built, but the CUDA kernels do not load"
  fi
}

part_tests() { pytest_part 170 6 -k "not triton" "${common_tests[@]}"; }

part_plans() {
  pytest_part 90 1 -k "not same_bits and not graph and not not_the_current" tests/test_cuda.py
}

# Compiling takes most of it, on the host.
part_compile() { pytest_part 150 8 tests/test_compile.py; }

part_determinism() { pytest_part 60 1 -k same_bits tests/test_cuda.py; }

part_graphs() {
  pytest_part 60 1 -k "graph or (test_streams and not not_the_current)" \
    tests/test_cuda.py tests/test_streams.py
}

part_devices() {
  count=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  if [ "${count:-0}" -lt 2 ]; then
    verdict "not available: needs two GPUs, there is ${count:-none}"
    return
  fi
  pytest_part 60 1 -k not_the_current tests/test_cuda.py tests/test_streams.py
}

part_triton() {
  detail=$("$python" -c 'from eca_fused import backends
b = backends()["triton"]
print(b)
raise SystemExit(not b)') || { verdict "not available: $detail"; return; }
  pytest_part 120 8 -k triton "${common_tests[@]}"
}

# sanitize TOOL: runs one of compute-sanitizer's tools; its verdict goes into a file
sanitize() {
  tool=$1
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 100 "$sanitizer" --tool "$tool" \
    --error-exitcode 9 "${filter[@]}" "$python" benchmarks/gpu_probe.py small \
    >"$work/sanitizer.$tool" 2>&1
  status=$?
  found=$(grep -E '(ERROR|RACECHECK) SUMMARY' "$work/sanitizer.$tool" | tail -n 1 |
    sed 's/^=* *//')
  if grep -qiE 'device not supported|not supported on|failed to initialize|unable to find inj' \
    "$work/sanitizer.$tool"; then
    result="not available: $(grep -iE 'not supported|failed to|unable to' \
      "$work/sanitizer.$tool" | head -n 1 | cut -c1-120)"
  elif [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then result="not available: not done in time"
  elif [ "$status" -eq 0 ] && [ -n "$found" ]; then result="ok: $found"
  else result="FAILED: ${found:-status $status}"
  fi
  printf '%s\n' "$result" >"$work/verdict.$tool"
}

part_sanitizer() {
  sanitizer=$(command -v compute-sanitizer || true)
  found=/usr/local/cuda/bin/compute-sanitizer
  if [ -z "$sanitizer" ] && [ -x "$found" ]; then sanitizer=$found; fi
  if [ -z "$sanitizer" ]; then
    verdict "not available: no compute-sanitizer"
    return
  fi
  # PyTorch's own kernels are not our matter, and take long. The name of ours has "eca" in it.
  filter=()
  help=$("$sanitizer" --help 2>&1)
  case $help in
    *--kernel-name*) filter+=(--kernel-name kernel_substring=eca) ;;
    *--kernel-regex*) filter+=(--kernel-regex kns=eca) ;;
  esac
  case $help in *--report-api-errors*) filter+=(--report-api-errors no) ;; esac
  if ! limited 60 "$python" benchmarks/gpu_probe.py small; then
    verdict "FAILED: wrong results even without the sanitizer"
    return
  fi
  tools=(memcheck racecheck initcheck synccheck)
  for tool in "${tools[@]}"; do sanitize "$tool" & done
  wait
  worst=ok
  texts=
  for tool in "${tools[@]}"; do
    printf '\n---- %s\n' "$tool"
    head -c 60000 "$work/sanitizer.$tool"
    result=$(cat "$work/verdict.$tool" 2>/dev/null || echo "FAILED: no result")
    texts="$texts; $tool $result"
    case $result in
      FAILED*) worst=FAILED ;;
      not*) [ "$worst" = FAILED ] || worst="not available" ;;
    esac
  done
  verdict "$worst: ${texts#; }"
}

part_profile() {
  ncu=$(command -v ncu || true)
  for found in /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu; do
    if [ -z "$ncu" ] && [ -x "$found" ]; then ncu=$found; fi
  done
  if [ -z "$ncu" ]; then
    verdict "not available: no ncu"
    return
  fi
  # The clocks stay as they are, and what a launch leaves in the L2 cache is there for the next.
  limited 100 "$ncu" --clock-control none --cache-control none --profile-from-start off \
    --kernel-name 'regex:on_chip|sum_|make_|rescale_' \
    --metrics dram__bytes_read.sum,dram__bytes_write.sum --print-units base --csv \
    "$python" benchmarks/gpu_probe.py large "$work/calls.json" >"$work/ncu.csv" 2>"$work/ncu.err"
  status=$?
  cat "$work/ncu.err"
  if [ -s "$work/calls.json" ] && "$python" benchmarks/gpu_probe.py read "$work/calls.json" \
    "$work/ncu.csv" >"$work/traffic" 2>&1; then
    printf '\nDETAILS\n'
    cat "$work/traffic"
    printf '\n'
    head -c 200000 "$work/ncu.csv"
    verdict "ok: bytes of $(grep -c '; ' "$work/traffic") calls"
  elif grep -qE 'ERR_NVGPUCTRPERM|LibraryNotLoaded|No kernels were profiled|not supported' \
    "$work/ncu.csv" "$work/ncu.err"; then
    head -c 20000 "$work/ncu.csv"
    verdict "not available: counters not readable ($(cat "$work/ncu.csv" "$work/ncu.err" |
      grep -E '^==(ERROR|WARNING)== ' | head -n 1 | cut -c1-120))"
  else
    head -c 20000 "$work/ncu.csv"
    verdict "FAILED: ncu ended with status $status"
  fi
}

part_bench() {
  seconds=$(($(left) - 45))
  [ "$seconds" -le 230 ] || seconds=230
  if [ "$seconds" -lt 20 ]; then
    verdict "not available: no time left"
    return
  fi
  compile=$((seconds * 2 / 5))
  limited $((seconds + 60)) "$python" benchmarks/microbench.py --device cuda --seconds "$seconds" \
    --direction forward backward 'forward and backward' --compile-seconds "$compile" \
    --compile-mode default max-autotune-no-cudagraphs --output "$dir/bench.json"
  status=$?
  if [ -s "$dir/bench.json" ]; then
    limited 40 "$python" benchmarks/report.py "$dir/bench.json" --plot "$dir/bench.png" \
      >"$dir/table.md" || status=$((status + 100))
    printf '\nDETAILS\n'
    grep -E '^- FAILED' "$dir/table.md" | head -n 6
    sed -n '1,24p' "$dir/table.md"
  fi
  layers=$("$python" -c 'import json, sys
print(len(json.load(open(sys.argv[1]))["rows"]))' "$dir/bench.json" 2>/dev/null)
  if [ "$status" -eq 0 ]; then verdict "ok: ${layers:-no} rows"
  else verdict "FAILED: status $status, ${layers:-no} rows"
  fi
}

part_tune() {
  seconds=$(($(left) - 25))
  [ "$seconds" -le 150 ] || seconds=150
  limited $((seconds + 20)) "$python" benchmarks/tune.py --seconds "$seconds" \
    --output "$dir/tune.json" >"$work/tune" 2>&1
  status=$?
  cat "$work/tune"
  printf '\nDETAILS\n'
  grep -E '^(\*|b|f)' "$work/tune" | cut -c1-100
  if [ "$status" -eq 0 ]; then verdict "ok: $(grep -c ' rows$' "$work/tune") layers and directions"
  else verdict "FAILED: status $status"
  fi
}

# script_part NAME SECONDS ARGUMENTS...: a script of benchmarks/ that writes NAME.json
script_part() {
  name=$1 seconds=$2 script=$3
  shift 3
  limited "$seconds" "$python" "benchmarks/$script" --device cuda --output "$dir/$name.json" "$@" \
    >"$work/$name" 2>&1
  status=$?
  cat "$work/$name"
  printf '\nDETAILS\n'
  grep -E '^(- )?FAILED|per element' "$work/$name" | cut -c1-200 | head -n 20
  if [ "$status" -eq 0 ]; then verdict "ok: $(grep -c '^| ' "$work/$name") lines of tables"
  else verdict "FAILED: status $status"
  fi
}

part_networks() {
  script_part networks 400 network.py --mode eager compiled --precision bfloat16 \
    --plot "$dir/networks.png"
}

part_sizes() {
  script_part sizes 400 scaling.py --dtype bfloat16 --again-seconds 60 --plot "$dir/sizes.png"
}

part_calls() { script_part calls 200 overhead.py; }

# ---- arguments ----

dry=
dir=
parts=()
is_part() { case " ${all_parts[*]} " in *" $1 "*) ;; *) return 1 ;; esac }
for argument; do
  case $argument in
    --list)
      printf '%s\n' "${all_parts[@]}"
      exit 0
      ;;
    --dry-run) dry=yes ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*)
      echo "gpu_check.sh: unknown option $argument; --help says what there is" >&2
      exit 2
      ;;
    *)
      if is_part "$argument"; then parts+=("$argument")
      elif [ -z "$dir" ] && [ "${#parts[@]}" -eq 0 ]; then dir=$argument
      else
        echo "gpu_check.sh: unknown part $argument; the parts are: ${all_parts[*]}" >&2
        exit 2
      fi
      ;;
  esac
done
if [ "${#parts[@]}" -eq 0 ]; then parts=("${usual_parts[@]}"); fi
case $dir in '' | /*) ;; *) dir=$here/$dir ;; esac

if [ -n "$dry" ]; then
  echo "DIR ${dir:-benchmarks/results/<name of the GPU>}"
  printf 'would run %s\n' "${parts[@]}"
  exit 0
fi

gpu=$("$python" -c 'import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null | tail -n 1)
if [ -z "$gpu" ]; then
  echo "gpu_check.sh: $python finds no GPU that torch can use; --dry-run needs none" >&2
  exit 2
fi
name=$(printf '%s' "$gpu" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-')
dir=${dir:-$root/benchmarks/results/${name%-}}
mkdir -p "$dir" || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
log=$dir/log.txt

# Without kernels the other parts would tell nothing.
case " ${parts[*]} " in
  *" build "*) ;;
  *) has_kernels || parts=(build "${parts[@]}") ;;
esac

# ---- the parts in turn ----

{
  printf 'gpu_check.sh %s\n%s, %s\n' "${parts[*]}" "$gpu" "$(date -u)"
  nvidia-smi || true
  "$python" -c 'import sys, torch
print(sys.version)
print("torch", torch.__version__, "CUDA", torch.version.cuda)'
} >"$log" 2>&1
: >"$work/verdicts"
failed=0
for part in "${parts[@]}"; do
  printf '\n######## %s\n' "$part" >>"$log"
  started=$SECONDS
  if [ "$(left)" -le 10 ]; then result="not available: no time left"
  else
    echo "... $part, $(left) s left"
    ("part_$part") >"$work/part" 2>&1
    # Of a log of any length the beginning and the end.
    if [ "$(wc -c <"$work/part")" -gt 2000000 ]; then
      { head -c 1000000 "$work/part"; printf '\n[...]\n'; tail -c 1000000 "$work/part"; } >>"$log"
    else cat "$work/part" >>"$log"
    fi
    result=$(sed -n 's/^VERDICT //p' "$work/part" | tail -n 1)
    result=${result:-FAILED: it ended without a verdict}
    sed -n '/^DETAILS$/,/^VERDICT /{/^DETAILS$/d;/^VERDICT /d;p}' "$work/part" |
      cut -c1-180 | head -n 40 >"$work/details.$part"
  fi
  case $result in FAILED*) failed=1 ;; esac
  printf '%s\t%s\t%s\n' "$part" "$((SECONDS - started))" "$result" >>"$work/verdicts"
  printf '%s: %s\n' "$part" "$result" | tee -a "$log" | cut -c1-300
  "$python" - "$work/verdicts" "$dir/summary.json" "$gpu" <<'END'
import json, sys
lines = [line.rstrip("\n").split("\t", 2) for line in open(sys.argv[1])]
parts = [{"part": p, "seconds": int(s), "verdict": v} for p, s, v in lines]
with open(sys.argv[2], "w") as file:
    json.dump({"gpu": sys.argv[3], "parts": parts}, file, indent=1)
    file.write("\n")
END
done

# ---- the end of the output is what is read first ----

{
  for part in "${parts[@]}"; do
    [ -s "$work/details.$part" ] || continue
    printf '\n---- %s\n' "$part"
    head -c 4000 "$work/details.$part"
  done
  printf '\n%s, %s s, %s\n' "$gpu" "$SECONDS" "$dir"
  while IFS=$(printf '\t') read -r part seconds result; do
    printf '%-12s %4s s  %s\n' "$part" "$seconds" "$result"
  done <"$work/verdicts" | cut -c1-400
} | tee -a "$log"
exit "$failed"
