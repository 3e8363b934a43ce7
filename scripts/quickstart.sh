#!/usr/bin/env bash
# From a fresh clone to a controlled fine-tuning run: virtual environment, install, and then
#
#   1. learn a schedule policy           runs/quickstart/policy
#   2. steer one job with it             runs/quickstart/finetune
#   3. compare it with usual schedules   runs/quickstart/compare
#
# A second call reuses the environment; it goes on with a training that was interrupted, keeps one that is finished,
# and does steps 2 and 3 anew. Delete runs/quickstart to start from nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment ""

# The built-in model is too small to gain from threads, and loses much where other programs run.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run=runs/quickstart
llmrl train --config configs/train/groups.yaml --output "$run" --resume

rm -rf "$run/finetune" "$run/compare"
llmrl finetune --config configs/finetune/quickstart.yaml --policy "$run/policy" --output "$run/finetune"
llmrl compare --config configs/compare/quickstart.yaml --policy "$run/policy" --output "$run/compare"

printf '%s\n' \
    "$run/policy" \
    "$run/finetune/schedule.jsonl" \
    "$run/finetune/schedule.png" \
    "$run/finetune/summary.json" \
    "$run/compare/results.json"
