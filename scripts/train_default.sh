#!/usr/bin/env bash
# The default policy from nothing, by the eighth recipe of docs/default_policy.md, in about 42 minutes of two cores
# (the sum of its parts):
#
#   scripts/train_default.sh [FOLDER]     # FOLDER: runs/default
#
# makes the base models and the corpora in training/, collects the experience in a run for each of EXPERIENCE (seeds,
# default "0 1"; they go side by side, a core each), learns one policy for each of SEEDS (default "0 1 2") in
# FOLDER/seed-N/policy, and joins two or more in FOLDER/policy. What is there already is kept: a second call goes on
# where one was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-runs/default}"
read -ra seeds <<<"${EXPERIENCE:-0 1}"

[ -d training/corpora ] || python scripts/make_training_corpora.py --output training/corpora
scripts/make_training_models.sh training/bases

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
collect() {
    llmrl train --config configs/train/default_experience.yaml --output "$1/experience-$2" --resume "seed=$2"
}
export -f collect
printf '%s\n' "${seeds[@]}" | xargs -P "${#seeds[@]}" -I {} bash -euo pipefail -c "collect '$folder' {}"

experience="$(printf ",$folder/experience-%s" "${seeds[@]}")"
policies=()
for seed in ${SEEDS:-0 1 2}; do
    llmrl train --config configs/train/default.yaml --output "$folder/seed-$seed" --resume \
        "seed=$seed" "agent.experience=[${experience:1}]"
    policies+=("$folder/seed-$seed/policy")
done
[ "${#policies[@]}" -lt 2 ] || [ -d "$folder/policy" ] || llmrl policy ensemble "${policies[@]}" --lower-bound 0.5 --output "$folder/policy"
