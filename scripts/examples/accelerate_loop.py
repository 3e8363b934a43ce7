"""A policy in a loop of your own with accelerate: language modelling from a learning rate ten times too high.

    python scripts/examples/accelerate_loop.py
    ACCELERATE_USE_CPU=true accelerate launch --config_file configs/accelerate/two_cpu_processes.yaml \
        scripts/examples/accelerate_loop.py

Three lines differ from a loop without it: `attach`, `before_step` (which clips) and `after_step`. Half-way the loop
saves its state, forgets everything and goes on from there, as after a crash.
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from llmrl_envs.builtin import builtin_model_path, load_corpus
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl import ScheduleController

LEARNING_RATE = 3e-2  # about 3e-3 would be right
STEPS = 80
ACCUMULATION = 2
LENGTH = 96


def pieces(split: str, count: int) -> list[torch.Tensor]:
    """Pieces of the corpus `html`, int64[LENGTH] each."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_path())
    ids = tokenizer("\n".join(load_corpus("html")[split]), add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - LENGTH, max((len(ids) - LENGTH) // count, 1))
    return [torch.tensor(ids[start : start + LENGTH]) for start in starts][:count]


class Job:
    """Model, optimizer and data, prepared; with a policy, or with linear decay."""

    def __init__(self, accelerator: Accelerator, policy: str | None) -> None:
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        data = DataLoader(pieces("train", 640), batch_size=4, shuffle=True)
        self.accelerator = accelerator
        self.model, self.optimizer, self.data = accelerator.prepare(model, optimizer, data)
        self.controller = None if policy is None else ScheduleController.from_pretrained(policy)
        if self.controller is not None:
            self.controller.attach(self.model, self.optimizer, accelerator, total_steps=STEPS)
            accelerator.register_for_checkpointing(self.controller)
        self.step = 0

    def train(self, until: int) -> None:
        """Takes optimizer steps up to the one with number `until`."""
        self.model.train()
        while self.step < until:
            for batch in self.data:
                with self.accelerator.accumulate(self.model):
                    loss = self.model(input_ids=batch, labels=batch).loss
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self._before_step(loss)
                    self.optimizer.step()
                    if self.accelerator.sync_gradients:
                        self.step += 1
                        if self.controller is not None:
                            self.controller.after_step()
                    self.optimizer.zero_grad()
                if self.step == until:
                    return

    def _before_step(self, loss: torch.Tensor) -> None:
        if self.controller is not None:
            self.controller.before_step(loss)
            return
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - self.step / STEPS)

    @torch.no_grad()
    def test_loss(self) -> float:
        """Mean over the test pieces, nats per token."""
        self.model.eval()
        batch = torch.stack(pieces("test", 32)).to(self.accelerator.device)
        return float(self.model(input_ids=batch, labels=batch).loss)


def main() -> None:
    """Trains with and without the policy from the same wrong rate."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATION)
    linear = Job(accelerator, None)
    linear.train(STEPS)
    losses = [linear.test_loss()]
    accelerator.free_memory()

    with tempfile.TemporaryDirectory() as own_folder:
        (folder,) = broadcast_object_list([own_folder])  # all processes use the first one's
        first = Job(accelerator, "hold")
        first.train(STEPS // 2)
        accelerator.save_state(folder)
        accelerator.free_memory()
        accelerator._custom_objects.clear()
        second = Job(accelerator, "hold")
        accelerator.load_state(folder)
        second.step = STEPS // 2
        second.train(STEPS)
        accelerator.wait_for_everyone()
    losses.append(second.test_loss())
    assert second.controller is not None
    rates = [record.learning_rate for record in second.controller.records]
    accelerator.print(f"learning rate given: {LEARNING_RATE:.0e}; highest after the crash: {max(rates):.1e}")
    accelerator.print(f"test loss: {losses[0]:.3f} with linear decay, {losses[1]:.3f} with the policy")


if __name__ == "__main__":
    main()
