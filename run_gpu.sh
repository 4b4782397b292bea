#!/bin/sh
# What a GPU machine runs: ./run_gpu.sh first [STEP] (all of benchmarks/first_gpu.py, or one step), or ./run_gpu.sh test.
set -eu
cd "$(dirname "$0")"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
case "${1:-}" in
  first) shift; exec "${PYTHON:-python3}" benchmarks/first_gpu.py "${@:-all}" ;;
  test) shift; exec "${PYTHON:-python3}" -m pytest -o addopts= -q tests/kernels/test_gpu.py "$@" ;;
  *) echo "usage: $0 first [STEP] | test" >&2; exit 2 ;;
esac
