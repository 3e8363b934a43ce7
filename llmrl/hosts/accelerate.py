"""Shares one job among the processes of `accelerate launch`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.parallel import ParallelContext, SingleProcess
from torch import Tensor, nn


class AcceleratorContext:
    """The processes of an accelerate launch, with one replica of the model each.

    Args:
        accelerator: The process-wide accelerator.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator: Any = accelerator
        self._prepared: tuple[nn.Module, nn.Module] | None = None

    @property
    def rank(self) -> int:
        """This process's index."""
        return int(self._accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        device: torch.device = self._accelerator.device
        return device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model wrapped so that gradients are averaged over the processes.

        A model that comes again, for another job, keeps its wrapper; another model's wrapper is let go first.
        """
        if self._prepared is not None and self._prepared[0] is model:
            return self._prepared[1]
        if self._prepared is not None:
            models = self._accelerator._models
            models[:] = [held for held in models if held is not self._prepared[1]]
        wrapped: nn.Module = self._accelerator.prepare_model(model)
        self._prepared = (model, wrapped)
        return wrapped

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes."""
        total: Tensor = self._accelerator.reduce(tensor.clone(), reduction="sum")
        return total

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Gradients travel in a step's last backward pass only."""
        return nullcontext() if last else self._accelerator.no_sync(model)

    def agree(self, action: int) -> int:
        """The first process's action, on every process."""
        value = torch.tensor([action], dtype=torch.int64, device=self.device)
        return int(broadcast(value, from_process=0).item())

    def gather_texts(self, text: str) -> list[str]:
        """Every process's text, in the order of their ranks."""
        gathered: list[str] = gather_object([text])
        return gathered

    def barrier(self) -> None:
        """Waits for the other processes."""
        self._accelerator.wait_for_everyone()


def launched_processes() -> int:
    """Number of processes that a launcher started this program in."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parallel_context() -> ParallelContext:
    """The context of this process: alone, or one of those that `accelerate launch` started.

    Raises:
        UserError: The launcher wants the model sharded; this loop keeps a replica on each process.
    """
    if launched_processes() == 1:
        return SingleProcess()
    accelerator: Any = Accelerator()
    kind = str(accelerator.distributed_type.value)
    if not kind.startswith("MULTI_"):
        raise UserError(
            "`llmrl finetune` keeps a replica of the model on each process",
            where="the accelerate configuration's key `distributed_type`",
            expected="MULTI_GPU; FSDP2 and DeepSpeed work in Trainer and in a loop of your own, see docs/hosts.md",
            got=kind,
        )
    return AcceleratorContext(accelerator)
