#!/usr/bin/env bash
# The default policy from nothing, in under three hours on two cores:
#
#   scripts/train_default.sh [FOLDER]     # FOLDER: runs/default
#
# makes the base models and the corpora in training/, collects the experience in PROCESSES (default 2) runs side by side,
# one core each, and learns one policy for each of SEEDS (default "0 1 2") in FOLDER/seed-N/policy. What is there already is
# kept: a second call goes on where one was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-runs/default}" processes="${PROCESSES:-2}"

[ -d training/corpora ] || python scripts/make_training_corpora.py --output training/corpora
PROCESSES="$processes" scripts/make_training_models.sh training/bases

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
collect() {
    llmrl train --config configs/train/default_experience.yaml --output "$1/experience-$2" --resume "seed=$2"
}
export -f collect
seq 0 "$((processes - 1))" | xargs -P "$processes" -I {} bash -euo pipefail -c "collect '$folder' {}"

experience="$(seq -s , -f "$folder/experience-%g" 0 "$((processes - 1))")"
for seed in ${SEEDS:-0 1 2}; do
    llmrl train --config configs/train/default.yaml --output "$folder/seed-$seed" --resume \
        "seed=$seed" "agent.experience=[$experience]"
done
