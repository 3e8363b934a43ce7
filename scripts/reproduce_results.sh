#!/usr/bin/env bash
# The results of the README: compares the default policy on the validation tasks and writes table and figure.
#
#   scripts/reproduce_results.sh MODELS_DIR DATA_DIR [KEY=VALUE ...]
#
# MODELS_DIR and DATA_DIR hold the models and data sets that configs/compare/validation.yaml names. Finished runs are
# kept in runs/validation, so a second call goes on where one was stopped. Further words override the configuration,
# e.g. seeds=3 workers=8; POLICY names another policy than the default one, README another file to write into.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
MODELS_DIR="$(realpath -e "$1")" DATA_DIR="$(realpath -e "$2")"
export MODELS_DIR DATA_DIR
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${NO_ENVIRONMENT:-}" ]; then
    source scripts/environment.sh
    prepare_environment "[baselines]"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run="${RUN:-runs/validation}" readme="${README:-README.md}"
llmrl compare --config configs/compare/validation.yaml --policy "${POLICY:-default}" --output "$run" "$@"
python scripts/results_table.py "$run/results.json" --readme "$readme"
cp "$run/comparison.png" "$(dirname "$readme")/docs/results.png"
