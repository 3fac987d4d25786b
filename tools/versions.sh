#!/usr/bin/env bash
# Tests the supported versions in tools/versions.txt, each in a clean environment.
#
#   tools/versions.sh                    every row, and builds of one torch under another
#   tools/versions.sh 2.11.0 default     these rows
#   tools/versions.sh --list             the rows, one per line
#   tools/versions.sh --write            also writes the table to tools/versions.md, with rows that
#                                        were tested earlier on the same commit
#
# ECA_FUSED_TEST_SAMPLE=N runs one in N of the cases that depend on torch least: those of kernels.
# VERSIONS_DIR (default: build/versions) holds the environments and the logs. The exit status is 1 if
# a row fails. It needs a Python of each version, on PATH or under pyenv, a compiler, and nvcc.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
folder=${VERSIONS_DIR:-$root/build/versions}

rows() { sed -e '/^#/d' -e '/^ *$/d' tools/versions.txt; }

write=
chosen=()
for argument; do
  case $argument in
    --list) rows | cut -d' ' -f1; exit 0 ;;
    --write) write=yes ;;
    -*) echo "versions.sh: unknown option $argument" >&2; exit 2 ;;
    *) chosen+=("$argument") ;;
  esac
done
for name in "${chosen[@]}"; do
  rows | cut -d' ' -f1 | grep -qxF -- "$name" ||
    { echo "versions.sh: no row $name; there are: $(rows | cut -d' ' -f1 | tr '\n' ' ')" >&2; exit 2; }
done

find_python() { # VERSION
  for found in "$(command -v "python$1" || true)" "$HOME"/.pyenv/versions/"$1"*/bin/python; do
    if [ -x "$found" ] && "$found" -c 'import venv, ensurepip' 2>/dev/null; then
      echo "$found"
      return
    fi
  done
  return 1
}

# prepare ENV PYTHON TORCH WITH: a clean environment with that torch, the package built in a copy
prepare() {
  rm -rf "$1"
  mkdir -p "$1"
  "$2" -m venv "$1/env" || return
  pip=("$1/env/bin/python" -m pip --disable-pip-version-check install -q)
  case $3 in
    default) spec=torch ;;
    newest) spec='torch --upgrade' ;;
    *) spec="torch==$3" ;;
  esac
  # shellcheck disable=SC2086  # "torch --upgrade" is two words
  "${pip[@]}" --upgrade pip && "${pip[@]}" $spec || return
  "$1/env/bin/python" -c 'from importlib.metadata import version as v
print("torch==" + v("torch"))' >"$1/constraints.txt" || return
  case $4 in
    -) ;;
    oldest) "$1/env/bin/python" tools/oldest.py >>"$1/constraints.txt" || return ;;
    *) echo "$4" >>"$1/constraints.txt" ;;
  esac
  mkdir -p "$1/source"
  git ls-files -co --exclude-standard | while read -r f; do [ ! -f "$f" ] || echo "$f"; done |
    tar c -T - | tar x -C "$1/source" || return
  git init -q "$1/source" && git -C "$1/source" add -A >/dev/null 2>&1
  "${pip[@]}" -c "$1/constraints.txt" 'setuptools>=77,<82' wheel ninja 'pybind11>=2.13' || return
  (
    cd "$1/source" || exit
    export PATH="$1/env/bin:$PATH" ECA_FUSED_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0
    "${pip[@]}" -c "$1/constraints.txt" --no-build-isolation --editable '.[test]'
  )
}

run_tests() { # ENV ARGUMENTS..., of pytest
  env=$1
  shift
  (
    cd "$env/source" || exit
    export PATH="$env/env/bin:$PATH" OMP_WAIT_POLICY=passive
    [ -z "${ECA_FUSED_TEST_SAMPLE-}" ] || {
      export PYTHONPATH=tests
      # Of our own kernels alone, or long: of layers on Triton the operators are enough, and of
      # converted networks one step.
      left_out='larger_than_the_caches other_processors random_views interpreter[layers]'
      left_out+=' test_sizes marks_select_them 20_steps_follow travel[second] travel[third]'
      set -- -p helpers.sample -k "not ${left_out// / and not }" "$@"
    }
    "$env/env/bin/python" -m pytest -q -n logical --maxprocesses 4 --dist loadgroup "$@"
  )
}

counts() { grep -E '[0-9]+ (passed|failed)' "$1" | tail -n 1 | sed 's/[= ]*\(.*\) in .*/\1/'; }
versions_of() { # ENV
  "$1/env/bin/python" -c 'import platform
from importlib.metadata import version as v
print(v("torch"), v("triton"), platform.python_version(), v("numpy"), sep=" | ")'
}

failed=0
mkdir -p "$folder"
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
keep() { printf '%s\n%s\n' "$commit" "$2" >"$folder/$1.row"; } # NAME TEXT: a row of the table
kept() { # NAME
  [ -f "$folder/$1.row" ] && [ "$(head -n 1 "$folder/$1.row")" = "$commit" ] && tail -n 1 "$folder/$1.row"
}
while read -r torch _ python with why; do
  if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $torch "* ]]; then continue; fi
  env=$folder/$torch
  log=$folder/$torch.log
  printf '==> torch %s, Python %s (%s)\n' "$torch" "$python" "$why"
  if ! interpreter=$(find_python "$python"); then
    keep "$torch" "| $torch | - | $python | - | not tested: no Python $python here |"
    failed=1
    continue
  fi
  started=$SECONDS
  if ! prepare "$env" "$interpreter" "$torch" "$with" >"$log" 2>&1; then
    tail -n 30 "$log"
    keep "$torch" "| $torch | - | $python | - | FAILED: could not be set up |"
    failed=1
    continue
  fi
  # The marks are in the test files; the rest of the suite does not depend on torch.
  run_tests "$env" -m 'any_device or every_torch' >>"$log" 2>&1 </dev/null
  status=$?
  result=$(counts "$log")
  [ $status -eq 0 ] || { failed=1; result="FAILED: $result"; grep -E '^(FAILED|ERROR) ' "$log" | head -n 40; }
  keep "$torch" "| $(versions_of "$env") | $result |"
  printf '    %s in %d s; %s\n' "$result" $((SECONDS - started)) "$log"
done < <(rows)

# Loads the kernels that each torch built under each other torch, to test the stable ABI.
crossed=()
if [ ${#chosen[@]} -ne 1 ]; then
  for built in "$folder"/*/source; do
    for under in "$folder"/*/source; do
      a=$(basename "$(dirname "$built")") b=$(basename "$(dirname "$under")")
      file=eca_fused/_kernels.so
      [ "$a" != "$b" ] && [ -f "$built/$file" ] && [ -f "$under/$file" ] && kept "$a" >/dev/null &&
        kept "$b" >/dev/null || continue
      cp "$under/$file" "$folder/own.so"
      cp "$built/$file" "$under/$file"
      run_tests "$folder/$b" tests/ops/test_operators.py tests/ops/test_values.py >"$folder/$a-under-$b.log" 2>&1 </dev/null
      status=$?
      cp "$folder/own.so" "$under/$file"
      result=$(counts "$folder/$a-under-$b.log")
      [ $status -eq 0 ] || { failed=1; result="FAILED: $result"; }
      crossed+=("$a-under-$b")
      keep "$a-under-$b" "| built with $a, under $b | | | | $result |"
    done
  done
fi

printf '\n'
{
  echo '| torch | triton | Python | numpy | tests |'
  echo '|---|---|---|---|---|'
  for name in $(rows | cut -d' ' -f1) "${crossed[@]}"; do kept "$name"; done
} | tee "$folder/table.md"
if [ -n "$write" ]; then
  {
    printf 'Made by `make versions`, on %s at commit %s. The tests are those that depend on torch.\n\n' \
      "$(date +%F)" "$commit"
    cat "$folder/table.md"
  } >tools/versions.md
fi
exit $failed
