"""Shares one job among the processes of `accelerate launch`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.parallel import ParallelContext, SingleProcess
from torch import Tensor, nn

from llmrl.live.capabilities import find_distribution

_SHARDING = ("FSDP", "DEEPSPEED")


class AcceleratorContext:
    """The processes of an accelerate launch, with one replica of the model each, or one shard of it.

    Args:
        accelerator: The process-wide accelerator.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator: Any = accelerator
        self._prepared: tuple[nn.Module, nn.Module] | None = None

    @property
    def rank(self) -> int:
        """This process's index."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def sharded(self) -> bool:
        """Whether the model is shared out: by FSDP2, or its optimizer's state by DeepSpeed."""
        return str(self.accelerator.distributed_type.value) in _SHARDING

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model wrapped so that gradients are averaged over the processes.

        A model that comes again, for another job, keeps its wrapper; another model's wrapper is let go first.
        """
        if self._prepared is not None and self._prepared[0] is model:
            return self._prepared[1]
        if self._prepared is not None:
            models = self.accelerator._models
            models[:] = [held for held in models if held is not self._prepared[1]]
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        self._prepared = (model, wrapped)
        return wrapped

    def prepare_sharded(self, job: Job, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Shares out a job's model and its optimizer; the job's parameters are this process's shards from then on."""
        task = job.task
        self.accelerator.gradient_accumulation_steps = task.gradient_accumulation
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:
            share = -(-task.batch_size // self.world_size)
            limit = task.optimizer.max_grad_norm
            plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": share,
                "train_batch_size": share * task.gradient_accumulation * self.world_size,
                "gradient_accumulation_steps": task.gradient_accumulation,
                "gradient_clipping": limit if math.isfinite(limit) else 0.0,
            }
        model, prepared = self.accelerator.prepare(job.loaded.model, optimizer)
        shards = {name: p for name, p in job.loaded.model.named_parameters() if name in job.loaded.trainable}
        job.loaded.trainable.update(shards)
        job.initial.update({name: p.detach().clone() for name, p in shards.items()})
        self._prepared = (job.loaded.model, model)
        return model, prepared

    def whole_state(self) -> dict[str, Tensor]:
        """All weights of the model that was shared out, on the first process; every process must call it."""
        assert self._prepared is not None
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self._prepared[1])
        return state

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes."""
        total: Tensor = self.accelerator.reduce(tensor.clone(), reduction="sum")
        return total

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Gradients travel in a step's last backward pass only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

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
        self.accelerator.wait_for_everyone()


def found_by_first(context: ParallelContext, find: Callable[[], str]) -> str:
    """What the first process finds, in every process.

    Raises:
        UserError: What the first refuses, all refuse: none of them is left waiting for another that is gone.
    """
    if not isinstance(context, AcceleratorContext):
        return find()
    found, refused = "", None
    if context.rank == 0:
        try:
            found = find()
        except UserError as error:
            refused = error
    found, told = context.gather_texts(found)[0], context.gather_texts("" if refused is None else str(refused))[0]
    if told:
        raise refused or UserError(told)
    return found


def launched_processes() -> int:
    """Number of processes that a launcher started this program in."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parallel_context() -> ParallelContext:
    """The context of this process: alone, or one of those that `accelerate launch` started.

    Raises:
        UserError: The launcher shares the model in a way in which a job cannot be steered.
    """
    if launched_processes() == 1:
        return SingleProcess()
    accelerator = Accelerator()
    find_distribution(nn.Module(), accelerator, launched_processes())
    return AcceleratorContext(accelerator)
