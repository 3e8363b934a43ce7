#!/usr/bin/env python
"""Pretrain small byte-level models: the built-in one, a Llama of 218 thousand parameters, in 20 minutes on one core.

    python scripts/make_base_model.py                              # the model that ships, with its seed and steps
    python scripts/make_base_model.py --output base --minutes 5
    python scripts/make_base_model.py --output base --quick        # a few seconds; the result is of no use
    python scripts/make_base_model.py --output bases/gpt2-120k --architecture gpt2 --hidden 48 --layers 3 \
        --steps 1500 --batch-size 8 --stages 0.05 0.3 1            # bases/gpt2-120k-s5, -s30, -s100

It learns from the standard library of the Python that runs it: sources and documentation, **without** every file
and every long line that a built-in corpus (`llmrl_envs.builtin.corpora`) is made of, so that fine-tuning on
`builtin:json` is fine-tuning on text that the model has not seen. Nothing is downloaded.

Runs with the same Python, torch, machine type, seed and number of steps give the same bytes. `--minutes` chooses the
number of steps by measuring the machine's speed and prints it, because it cannot be known beforehand. With `--stages`
the model is kept at these shares of the training, as it is then, and training stops at the last one.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch
from base_model_folder import write_folder
from base_model_networks import ARCHITECTURES, Recipe, build_model
from base_model_text import pretraining_text
from base_model_training import steps_in, train
from llmrl_envs.builtin import builtin_model_path


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; `--help` shows this file's first lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=builtin_model_path(), help="folder to write, replaced if there")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=Recipe.steps, help=f"training steps (default {Recipe.steps})")
    length.add_argument("--minutes", type=float, help="as many steps as fit into this time on this machine")
    length.add_argument("--quick", action="store_true", help="20 steps, to see that it works")
    parser.add_argument("--stages", type=float, nargs="+", help="keep OUTPUT-sPERCENT at these shares of the steps")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default=Recipe.architecture)
    parser.add_argument("--hidden", type=int, default=Recipe.hidden_size, help="hidden size")
    parser.add_argument("--layers", type=int, default=Recipe.num_layers)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size, help="windows of a step")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Gather the text, train, save."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)  # a model this small gains nothing from more, and sums then have one order
    torch.use_deterministic_algorithms(True)
    tokens, validation = pretraining_text(Path(sysconfig.get_path("stdlib")))
    print(f"{len(tokens) / 1e6:.1f} MB for training, {len(validation) / 1e6:.2f} MB for validation")
    recipe = Recipe(
        architecture=options.architecture,
        hidden_size=options.hidden,
        num_layers=options.layers,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        learning_rate=options.learning_rate,
    )
    if options.quick or options.minutes is not None:
        steps = 20 if options.quick else steps_in(options.minutes, tokens, recipe)
        recipe = replace(recipe, steps=steps)
        print(f"--steps {steps} gives this model again")
    outputs = {recipe.steps: options.output}
    if options.stages:
        outputs = {
            max(1, round(share * recipe.steps)): options.output.with_name(f"{options.output.name}-s{100 * share:g}")
            for share in options.stages
        }
    model = build_model(recipe)

    def keep(step: int, loss: float) -> None:
        write_folder(model, recipe, len(tokens), step, loss, outputs[step])

    train(model, tokens, validation, recipe, outputs, keep)


if __name__ == "__main__":
    sys.exit(main())
