#!/usr/bin/env bash
# Builds the extension with CPU and sm_90 kernels into build/gpu, for a GPU machine without the time
# or network to build it. git ignores build/gpu, so copy it there.
#
#   tools/gpu_bundle.sh /path/to/python      # with the Python of the GPU machine, and its torch or
#                                            # an older one: the build uses PyTorch's stable ABI
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:?usage: tools/gpu_bundle.sh PYTHON}
"$python" - <<'END'
import sys
from importlib.metadata import version
found = sys.version_info[:2], tuple(map(int, version("torch").split(".")[:2]))
if found[0] != (3, 12) or found[1] > (2, 11):
    sys.exit("gpu_bundle.sh: expected Python 3.12 with torch 2.11 or older, as on the GPU machine, "
             f"got {found}; the planner loads only in the Python version it was built for")
END
folder=build/gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Builds in a copy of the tracked and new files, so that an extension in use here stays unchanged.
git ls-files -co --exclude-standard | tar c -T - | tar x -C "$work"
bin=$(cd "$(dirname "$python")" && pwd)
(
  cd "$work"
  export ECA_FUSED_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST-9.0}"
  PATH="$bin:$PATH" "$bin/$(basename "$python")" setup.py build_ext --inplace
) >"$work.log" 2>&1 || { tail -n 30 "$work.log" >&2; exit 1; }
rm -f "$work.log"
rm -rf "$folder"
mkdir -p "$folder"
cp "$work"/eca_fused/*.so "$folder/"
git rev-parse --short HEAD >"$folder/commit" 2>/dev/null || true
bytes=$(du -sb "$folder" | cut -f1)
[ "$bytes" -lt $((64 << 20)) ] || { echo "$folder has $bytes bytes, more than 64 MiB" >&2; exit 1; }
echo "$folder: $bytes bytes"
