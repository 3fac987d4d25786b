#!/bin/sh
# Prepares the Python environment that the Makefile uses: finds or makes it, installs what is
# missing and compiles the extension. Finished steps are not repeated.
#
#   tools/setup.sh [extra...]     extras are those of pyproject.toml: demo, test, dev
set -eu
cd "$(dirname "$0")/.."

say() { printf '==> %s\n' "$*"; }

die() {
  printf '\nerror: %s\n' "$*" >&2
  exit 1
}

# ---- steps that take long ----

# step MESSAGE COMMAND...: the output is shown only if the command fails
step() {
  say "$1"
  shift
  started=$(date +%s)
  "$@" >"$log" 2>&1 </dev/null || explain_failure
  printf '    done in %d s\n' $(($(date +%s) - started))
}

explain_failure() {
  cat "$log" >&2
  ours=$(sed -n 's/^ *eca_fused: error: //p' "$log" | tail -n 1)
  compiler=$(grep -m 5 -E '^ *[^ ]+:[0-9]+:[0-9]+: (fatal )?error: ' "$log" || true)
  if [ -n "$ours" ]; then
    die "$ours"
  elif [ -n "$compiler" ]; then
    die "the extension does not compile; the first errors are:
$compiler"
  elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|Could not resolve|Temporary failure in name resolution' "$log"; then
    die "no network: the package index cannot be reached (above). Connect this machine, or set" \
      "PIP_INDEX_URL or PIP_PROXY to a mirror or proxy that it can reach, and run this again."
  elif grep -qE 'CERTIFICATE_VERIFY_FAILED|SSLError' "$log"; then
    die "the certificate of the package index is not trusted; set PIP_CERT to the right bundle."
  elif grep -q 'No space left on device' "$log"; then
    die "the disk is full; PyTorch with its CUDA libraries needs about 6 GB."
  elif grep -q 'No matching distribution found for torch' "$log"; then
    die "there is no PyTorch 2.11 or newer for this Python and machine; try another Python," \
      "for example: make run PYTHON=python3.12"
  fi
  die "this step failed; the reason is above."
}

pip() { PATH="$env/bin:$PATH" "$env/bin/python" -m pip --disable-pip-version-check "$@"; }

# ---- what the system must have ----

works() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
    if works "$python"; then return; fi
  done
  die "Python 3.10 or newer is needed, found: $("${PYTHON:-python3}" --version 2>/dev/null || echo none)." \
    "Install one, or name one that is not on PATH: make run PYTHON=/path/to/python3"
}

need_compiler() {
  if [ -n "${CXX:-}" ] || command -v g++ >/dev/null; then return; fi
  if command -v clang++ >/dev/null; then
    export CC=clang CXX=clang++
    return
  fi
  die "no C++ compiler. Install one (Debian and Ubuntu: apt-get install g++), or set CXX."
}

# Debian and Ubuntu split Python into packages. PYTHON needs these to make an environment and to
# compile an extension.
need_python_parts() {
  packages=$("$1" - <<'END'
import importlib.util, os, sys, sysconfig
name = "python%d.%d" % sys.version_info[:2]
packages = []
if not importlib.util.find_spec("ensurepip") and sys.prefix == sys.base_prefix:
    packages.append(name + "-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    packages.append(name + "-dev")
print(*packages)
END
)
  [ -n "$packages" ] || return 0
  if ! command -v apt-get >/dev/null; then
    die "this Python lacks its header files or its venv module: install those parts of it" \
      "(on Debian they are called $packages), or use another: make run PYTHON=/path/to/python3"
  elif [ "$(id -u)" != 0 ]; then
    die "Python lacks a part that the build needs. Run: sudo apt-get install -y $packages"
  fi
  # shellcheck disable=SC2086
  step "Installing $packages with apt-get (under a minute)" apt_install $packages
}

apt_install() {
  apt-get update || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# ---- the installed torch ----

torch_version() {
  "$1" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

recent() { printf '2.11\n%s\n' "$1" | sort -VC; }

# Makes pip keep the installed torch, whatever other packages ask for.
keep_torch() {
  torch=$(torch_version "$env/bin/python")
  if [ -n "$torch" ] && recent "$torch"; then
    # Other packages this torch needs: the fourth column (`with`) of its row in the table.
    echo "torch==$torch" >"$state/constraints.txt"
    awk -v torch="${torch%%+*}" '$1 == torch && $4 != "-" { print $4 }' tools/versions.txt \
      >>"$state/constraints.txt"
  elif [ -n "$torch" ] && [ "$env" != "$PWD/.venv" ]; then
    die "the active environment has torch $torch; 2.11 or newer is needed. Upgrade it there, or" \
      "run 'deactivate', and make will use an environment of its own."
  else
    : >"$state/constraints.txt"
  fi
}

# ---- the steps ----

make_environment() {
  [ ! -d .venv ] || say "Replacing .venv, which has no Python 3.10 or newer that runs"
  find_python
  need_compiler
  need_python_parts "$python"
  torch=$(torch_version "$python")
  if [ -n "$torch" ] && recent "$torch"; then
    step "Making .venv with $("$python" --version), keeping its torch $torch" \
      "$python" -m venv --clear --system-site-packages .venv
  else
    step "Making .venv with $("$python" --version)" "$python" -m venv --clear .venv
  fi
}

install_build_requirements() {
  keep_torch
  requirements=$("$env/bin/python" - <<'END'
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")
END
)
  if [ -s "$state/constraints.txt" ]; then
    message="Installing the build tools; torch $torch is kept (under a minute)"
  else
    message="Installing PyTorch and the build tools (about 3 GB with the CUDA libraries; 2 to 15 minutes)"
  fi
  # shellcheck disable=SC2086  # one requirement a line, without blanks
  step "$message" pip install -q -c "$state/constraints.txt" $requirements
  keep_torch
}

# `make test` also needs nvcc. It comes from PyPI if the machine has none that fits.
install_nvcc() {
  packages=$("$env/bin/python" - <<'END'
import os, shutil, torch
from setup import candidate_homes, choose_toolkit, nvcc_packages
toolkit, _ = choose_toolkit(
    None, candidate_homes(os.environ, shutil.which("nvcc")), torch.__version__, torch.version.cuda,
    has_kernels=True,
)
if toolkit is None and torch.version.cuda:
    print(*nvcc_packages(torch.version.cuda))
END
)
  # shellcheck disable=SC2086  # one requirement a word
  [ -z "$packages" ] || step "Installing nvcc (about a minute)" pip install -q $packages
}

sees_gpu() {
  "$env/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

compile() {
  need_compiler
  need_python_parts "$env/bin/python"
  if [ "$purpose" = quick ] && [ -z "${ECA_FUSED_CUDA:-}" ] && ! sees_gpu; then
    export ECA_FUSED_CUDA=0  # saves minutes of nvcc without a GPU
  elif [ "$purpose" = test ] && [ "${ECA_FUSED_CUDA:-}" != 0 ]; then
    install_nvcc
  fi
  step "Compiling the extension (a minute; with CUDA kernels two to ten)" \
    pip install -v --no-deps --no-build-isolation --editable .
  sed -n 's/^ *eca_fused: /    /p' "$log" | tail -n 1
  "$env/bin/python" - <<'END' || die "the extension was compiled but cannot be used; the reason is above."
import sys
from eca_fused import backends
native = backends()["native"]
sys.exit(None if native else native.detail)
END
}

has() { "$env/bin/python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))"; }

install_extras() {
  has torchvision && had_torchvision=yes || had_torchvision=
  step "Installing the packages for: $1 (about a minute)" \
    pip install -q -c "$state/constraints.txt" "eca-fused[$1]"
  # A torch from another index, such as one without CUDA, may not load the default index's
  # torchvision. Only the detectors, timm and the tests that compare with them need it.
  if [ -z "$had_torchvision" ] && has torchvision &&
    ! "$env/bin/python" -c 'import torchvision' >"$log" 2>&1; then
    step "Removing torchvision, which does not load in this torch; tests that need it are skipped" \
      pip uninstall -q -y torchvision
    echo "    To run them, install the torchvision that belongs to torch $(torch_version "$env/bin/python")."
  fi
}

# unchanged STAMP: that step was done with this pyproject.toml
unchanged() { cmp -s pyproject.toml "$state/$1"; }
done_with() { cp pyproject.toml "$state/$1"; }

# Whether the extension was built in this folder, the same way, from the current sources. For a
# quick purpose any way will do.
built() {
  ls eca_fused/_C.*.so eca_fused/_kernels.so >/dev/null 2>&1 && [ -f "$state/build" ] &&
    case "$(cat "$state/build")" in
      "$build") true ;;
      "$PWD "*) [ "$purpose" = quick ] && [ -z "${ECA_FUSED_CUDA:-}" ] ;;
      *) false ;;
    esac &&
    [ -z "$(find csrc setup.py pyproject.toml -newer "$state/build")" ]
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM

if [ -n "${VIRTUAL_ENV:-}" ]; then
  env=$VIRTUAL_ENV
  works "$env/bin/python" || die "the active environment $env has no Python 3.10 or newer:" \
    "run 'deactivate', and make will use an environment of its own."
else
  env=$PWD/.venv  # an absolute path, because the build finds ninja by it from other folders
  works "$env/bin/python" || make_environment
fi
state=$env/.eca_fused
mkdir -p "$state"

if ! unchanged requirements; then
  pip --version >/dev/null 2>&1 || step "Installing pip" "$env/bin/python" -m ensurepip
  install_build_requirements
  done_with requirements
fi

case " $* " in
  *" test "*) purpose=test ;;
  "  ") purpose=build ;;
  *) purpose=quick ;;
esac
kind=whole
[ "$purpose" != quick ] || kind=quick
build="$PWD $kind ECA_FUSED_CUDA=${ECA_FUSED_CUDA:-} ${TORCH_CUDA_ARCH_LIST:-}"
if ! built; then
  # The stamp dates from the start of the build, so a source edited meanwhile is compiled next time.
  echo "$build" >"$state/started"
  compile
  mv "$state/started" "$state/build"
fi

wanted=
for extra; do
  unchanged "extra-$extra" || wanted="${wanted:+$wanted,}$extra"
done
if [ -n "$wanted" ]; then
  install_extras "$wanted"
  for extra; do done_with "extra-$extra"; done
fi
