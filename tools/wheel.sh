#!/bin/sh
# Builds into dist/: the archive of the sources; from it, the wheel with the kernels, and the wheel
# without them, for systems that it does not fit.
#
# The tag of the first wheel is the oldest system that has all that it needs, by auditwheel. A build
# in the container manylinux_2_28 fits more systems than one here.
set -eu
cd "$(dirname "$0")/.."
env=${VIRTUAL_ENV:-$PWD/.venv}
PATH="$env/bin:$PATH"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf dist
python -m build --no-isolation --sdist --outdir dist .
tar -xf dist/*.tar.gz -C "$work"
sources=$(echo "$work"/*)

started=$(date +%s)
python -m build --no-isolation --wheel --outdir "$work/native" "$sources"
seconds=$(($(date +%s) - started))
# torch itself has these.
auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist "$work"/native/*.whl

ECA_FUSED_NATIVE=0 python -m build --no-isolation --wheel --outdir dist "$sources"

printf '\ncompiled in %d s\n' "$seconds"
du -h dist/*
