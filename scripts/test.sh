#!/usr/bin/env bash
# Every check of the project on a fresh machine: virtual environment, install, format, lint, types, tests.
#
#   scripts/test.sh [words for pytest]      e.g. scripts/test.sh -m slow tests/llmrl
#
# A second call reuses the environment of the first. Nothing is downloaded by the tests themselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment "[test]"

export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
# Two test processes with one thread each: more threads would only wait for each other.
export OMP_NUM_THREADS=1

ruff format --check .
ruff check .
mypy
pytest -q -n 2 -m "not slow" "$@"
