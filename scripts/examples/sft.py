"""A policy in TRL's SFTTrainer with LoRA: instructions from a learning rate ten times too low.

    python scripts/examples/sft.py                   # needs `pip install llmrl[trl]`

The only line that differs from an SFTTrainer without it is the one with `ScheduleCallback`. The instructions are made
here: repeat a word, or write it backwards.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

from datasets import Dataset
from llmrl_envs.builtin import builtin_model_path
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llmrl import ScheduleCallback

LEARNING_RATE = 1e-3  # about 1e-2 would be right for these adapters
STEPS = 100
LETTERS = "abcdefgh"


def instructions(count: int, seed: int) -> Dataset:
    """Prompts with their completions."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(generator.choices(LETTERS, k=generator.randint(3, 6)))
        task, answer = generator.choice([("repeat", word), ("reverse", word[::-1])])
        rows.append({"prompt": f"{task} {word}:", "completion": f" {answer}\n"})
    return Dataset.from_list(rows)


def train(learning_rate: float, callbacks: list[Any]) -> tuple[float, SFTTrainer]:
    """Trains from a learning rate; returns the test loss and the trainer."""
    path = str(builtin_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(path),
            args=SFTConfig(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=8,
                learning_rate=learning_rate,
                max_length=64,
                logging_steps=20,
                save_strategy="no",
                report_to=[],  # "wandb" logs llmrl/* too
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
            train_dataset=instructions(1000, seed=0),
            eval_dataset=instructions(64, seed=1),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=callbacks,
        )
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer


def main() -> None:
    """Trains with and without the policy from the same wrong rate."""
    linear, _ = train(LEARNING_RATE, [])
    steered, trainer = train(LEARNING_RATE, [ScheduleCallback("hold")])
    rates = [row["llmrl/learning_rate"] for row in trainer.state.log_history if "llmrl/learning_rate" in row]
    print(f"learning rate given: {LEARNING_RATE:.0e}; highest that the policy took: {max(rates):.1e}")
    print(f"test loss: {linear:.3f} with linear decay, {steered:.3f} with the policy")


if __name__ == "__main__":
    main()
