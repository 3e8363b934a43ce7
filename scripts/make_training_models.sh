#!/usr/bin/env bash
# Base models of several sizes, architectures and stages of pretraining, for policies to learn on:
#
#   scripts/make_training_models.sh [FOLDER]     # FOLDER: bases
#
# makes FOLDER/NAME-sPERCENT of each line below; the built-in model is llama-220k at 100 %. Two at a time, one thread
# each, about 15 minutes on two cores. What is there already is kept, so a second call goes on where one was stopped.
set -euo pipefail
folder="$(realpath -m "${1:-bases}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_models() {
    local folder="$1" name="$2" stages="$3" stage percent
    shift 3
    for stage in $stages; do
        percent="$(python -c 'import sys; print(f"{100 * float(sys.argv[1]):g}")' "$stage")"
        if [ ! -d "$folder/$name-s$percent" ]; then
            mkdir -p "$folder"
            # shellcheck disable=SC2086
            python scripts/make_base_model.py --output "$folder/$name" --stages $stages "$@" >"$folder/$name.log" 2>&1
            echo "$name at ${stages// /, } of its pretraining in $folder"
            return
        fi
    done
    echo "$name is there already"
}
export -f make_models
export OMP_NUM_THREADS=1

xargs -d '\n' -P "${PROCESSES:-2}" -I {} bash -euo pipefail -c "make_models '$folder' {}" <<'MODELS'
llama-70k  '0.05 0.3 1' --hidden 40 --layers 3 --steps 2000 --batch-size 8
gpt2-120k  '0.05 0.3 1' --architecture gpt2 --hidden 48 --layers 3 --steps 1500 --batch-size 8
llama-220k '0.05 0.3'   --steps 4000
bert-120k  '0.3 1'      --architecture bert --hidden 48 --layers 3 --steps 1500 --batch-size 8
llama-480k '0.05 0.3 1' --hidden 96 --layers 4 --steps 1200 --batch-size 8
MODELS
