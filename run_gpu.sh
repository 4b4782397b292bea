#!/bin/sh
# What a GPU machine runs: ./run_gpu.sh first [STEP] (all of benchmarks/first_gpu.py, or one step), ./run_gpu.sh test, or
# ./run_gpu.sh --gpus N: one clip on N GPUs beside one; each result is checked first, and no speed stated where it is wrong.
set -eu
cd "$(dirname "$0")"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
case "${1:-}" in
  first) shift; exec "${PYTHON:-python3}" benchmarks/first_gpu.py "${@:-all}" ;;
  test) shift; exec "${PYTHON:-python3}" -m pytest -o addopts= -q tests/kernels/test_gpu.py "$@" ;;
  --gpus)
    status=0
    for workload in demo dit-2b-full vae-full dit-5b-full; do
      "${PYTHON:-python3}" -m cogvx_fast bench scaling "$workload" --processes "${2:?how many GPUs}" || status=1
    done
    exit $status ;;
  *) echo "usage: $0 first [STEP] | test | --gpus N" >&2; exit 2 ;;
esac
