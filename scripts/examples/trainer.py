"""A policy in a transformers Trainer: classification from a learning rate ten times too high.

    python scripts/examples/trainer.py

The only line that differs from a Trainer without it is the one with `ScheduleCallback`. The model is the built-in one
with a classification head: which of four corpora is a piece of text from?
"""

from __future__ import annotations

import tempfile
from typing import Any

from llmrl_envs.builtin import builtin_model_path, load_corpus
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from llmrl import ScheduleCallback

TOPICS = ("json", "email", "html", "typing")
LEARNING_RATE = 1e-2  # about 1e-3 would be right
STEPS = 120
LENGTH = 96


def pieces(split: str, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Pieces of text of each topic, tokenised, the topics in turn."""
    rows = []
    for label, topic in enumerate(TOPICS):
        text = "\n".join(load_corpus(topic)[split])
        for index in range(count):
            start = index * (len(text) - LENGTH) // count
            ids = tokenizer(text[start : start + LENGTH], truncation=True, max_length=LENGTH)["input_ids"]
            rows.append((index, {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def train(learning_rate: float, callbacks: list[Any]) -> tuple[float, Trainer]:
    """Trains from a learning rate; returns the test loss and the Trainer."""
    set_seed(0)
    path = str(builtin_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(TOPICS))
    model.config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=8,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                logging_steps=20,
                save_strategy="no",
                report_to=[],  # "wandb" logs llmrl/* too
                disable_tqdm=True,
            ),
            train_dataset=pieces("train", 240, tokenizer),
            eval_dataset=pieces("test", 24, tokenizer),
            processing_class=tokenizer,
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
