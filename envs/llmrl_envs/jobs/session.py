"""One fine-tuning job: a Hugging Face model, its data, AdamW, and a schedule that is asked for every step's rate.

The environment and `llmrl finetune` run their jobs through this one loop, on one process or on several. Same task,
seed and actions give the same numbers, bit for bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice
from llmrl_envs.interface.recorder import StatisticsRecorder
from llmrl_envs.interface.statistics import TrainingStatistics, empty_statistics
from llmrl_envs.jobs.extensions import GradientClipper, ModalOptimizer, OptimizerFactory, StepRates, clip_to_limit
from llmrl_envs.jobs.layers import lower_half
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.optimizer import build_optimizer, low_rank_pairs
from llmrl_envs.jobs.parallel import ParallelContext, SingleProcess
from llmrl_envs.jobs.passes import Evaluation, JobPasses, nan_unless_finite
from llmrl_envs.jobs.precision import Precision
from llmrl_envs.jobs.snapshot import SessionSnapshot, present_tensors, restore_snapshot, take_snapshot

LEVEL_NORMS = ("effective", "adapters")


class FineTuningSession:
    """A job under way.

    Args:
        job: The task with its model and data, loaded. The session trains the job's own model, from its initial
            weights on; only one session of a job can be under way.
        seed: Seed of data order and dropout.
        parallel: The processes that share the job.
        average_steps: Time constant, in optimizer steps, of an exponential average of the weights; 0 keeps none.
        level_norm: For LoRA, which norms a level refers to: "effective" (the change of the adapted weights) or
            "adapters" (the adapters' own).
        record: Measure statistics; without, `run_interval` trains and returns statistics that know nothing.
        optimizer: Makes another optimizer than AdamW. Its update is not measured, and there are no snapshots.
        clip: Clips gradients in another way than to the task's limit.

    Raises:
        UserError: A batch has fewer examples than there are processes, or there is no such `level_norm`.
    """

    def __init__(
        self,
        job: Job,
        *,
        seed: int,
        parallel: ParallelContext | None = None,
        average_steps: float = 0.0,
        level_norm: str = "effective",
        record: bool = True,
        optimizer: OptimizerFactory | None = None,
        clip: GradientClipper = clip_to_limit,
    ) -> None:
        self.job = job
        self.task = job.task
        self.seed = seed
        self.parallel: ParallelContext = parallel or SingleProcess()
        if level_norm not in LEVEL_NORMS:
            expected = " or ".join(LEVEL_NORMS)
            raise UserError("unknown norm of a level", expected=expected, got=repr(level_norm), where="level_norm")
        self.precision = Precision(job.task.precision, job.device)
        self._passes = JobPasses(job, seed, self.parallel, self.precision)
        self.step = 0
        self.tokens_trained = 0
        self._record = record
        self._parameters: dict[str, Parameter] = job.loaded.trainable
        job.restore_initial_weights()
        self._model = self.parallel.prepare(job.loaded.model)
        self.optimizer = (optimizer or build_optimizer)(self._parameters, job.task.optimizer)
        self._clip = clip
        self._can_snapshot = optimizer is None
        if isinstance(self.optimizer, ModalOptimizer):
            self.optimizer.train()
        self._lower_half = lower_half(tuple(self._parameters))
        self._recorder = StatisticsRecorder(
            self.optimizer,
            device=job.device,
            mode=job.mode,
            trainable_fraction=job.loaded.trainable_fraction,
            capacity_steps=job.task.steps,
            pairs=low_rank_pairs(job.loaded.model) if level_norm == "effective" else (),
            source="moments" if optimizer is None else "difference",
        )
        self._average_weight = 0.0 if average_steps <= 0 else 1.0 - float(np.exp(-1.0 / average_steps))
        self._average = [p.detach().clone() for p in self._parameters.values()] if average_steps > 0 else []
        self._best: SessionSnapshot | None = None
        self._random_state = seeded_random_state(seed + 7919 * self.parallel.rank, job.device)

    # -- training -------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> frozenset[UpdateChoice]:
        """Update choices that would change this job: freezing needs layers, tightening a limit, leaning AdamW."""
        useless = set() if self._lower_half else {UpdateChoice.FREEZE}
        useless |= set() if self._can_snapshot else {UpdateChoice.QUASI_HYPERBOLIC}
        useless |= set() if math.isfinite(self.task.optimizer.max_grad_norm) else {UpdateChoice.TIGHTEN}
        return frozenset(UpdateChoice) - useless

    @property
    def total_steps(self) -> int:
        """The job's budget in optimizer steps."""
        return self.task.steps

    def initial_statistics(self) -> TrainingStatistics:
        """Statistics before the first step."""
        fraction = np.array([self.job.loaded.trainable_fraction])
        return empty_statistics(np.array([self.total_steps]), np.array([int(self.job.mode)]), fraction)

    def initial_norms(self) -> tuple[float, float]:
        """||u|| and ||theta|| as far as they are known before the first step."""
        return self._recorder.initial_norms(tuple(self._parameters.values()))

    def run_interval(self, num_steps: int, schedule: StepRates) -> TrainingStatistics:
        """Trains `num_steps` optimizer steps at the schedule's rates and returns what they measured.

        Args:
            num_steps: Length of the interval.
            schedule: One lane; it is asked for each step's rate and toggles, and not changed.

        Raises:
            ValueError: The interval runs past the job's budget.
        """
        if not 1 <= num_steps <= self.total_steps - self.step:
            raise ValueError(f"num_steps: expected 1 to {self.total_steps - self.step}, got {num_steps}")
        rates = [float(schedule.learning_rate(np.array([self.step + i]))[0]) for i in range(num_steps)]
        limit = self.task.optimizer.max_grad_norm * float(schedule.clipping_factor()[0])
        frozen, share = bool(schedule.frozen[0]), float(schedule.momentum_share()[0])
        skip_outliers = self._record and schedule.skips_outliers()
        self._model.train()
        with self._own_random_state():
            for index, rate in enumerate(rates):
                probe = self._record and index == num_steps - 1
                self._train_step(rate, limit, share, frozen=frozen, probe=probe, skip_outliers=skip_outliers)
        if not self._record:
            return self._unrecorded(num_steps)
        world = self.parallel.world_size
        return self._recorder.collect(
            step=self.step,
            total_steps=self.total_steps,
            reduce=(lambda tensor: self.parallel.sum(tensor) / world) if world > 1 else None,
        )

    def _unrecorded(self, num_steps: int) -> TrainingStatistics:
        empty = self.initial_statistics()
        return TrainingStatistics(**{**vars(empty), "step": np.array([self.step], np.int64)})

    def _train_step(
        self, rate: float, limit: float, share: float, *, frozen: bool, probe: bool, skip_outliers: bool
    ) -> None:
        loss = self._accumulate_gradients()
        if frozen:
            for name in self._lower_half:
                self._parameters[name].grad = None
        self.precision.unscale(self.optimizer)
        active = [p for p in self._parameters.values() if p.grad is not None]
        norm = self._clip(active, limit)
        self._recorder.before_update(active, probe=probe)
        allowed: Tensor | bool = True
        if self._record:
            world = self.parallel.world_size
            shared = self.parallel.sum(loss) / world if skip_outliers and world > 1 else loss
            allowed = self._recorder.record_step(
                shared, norm, learning_rate=rate, max_gradient_norm=limit, skip_outliers=skip_outliers
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.precision.step(self.optimizer, norm, share, allowed=allowed)
        self._recorder.after_update(active, probe=probe)
        self.optimizer.zero_grad(set_to_none=True)
        if self._average:
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters.values()], self._average_weight)
        self.step += 1

    def _accumulate_gradients(self) -> Tensor:
        """Backward passes of one optimizer step; returns its mean loss per target, nats, a scalar on the device."""
        total = torch.zeros((), device=self.job.device)
        for batch in self._passes.micro_batches(self.step):
            with self.parallel.accumulate(self._model, last=batch.last):
                loss = self._passes.training_loss(self._model, batch)
                self.precision.scale(nan_unless_finite(loss)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            self.tokens_trained += batch.num_tokens
        return total

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, split: str, *, averaged: bool = False) -> Evaluation:
        """Loss on the fixed subset of a split ("validation" or "test").

        Args:
            split: Which split.
            averaged: Evaluate the averaged weights in place of the deployed ones.
        """
        if averaged and not self._average:
            raise ValueError("averaged: expected a session made with average_steps > 0")
        with self._averaged_weights() if averaged else self._deployed_weights():
            return self._passes.evaluate(split)

    @contextmanager
    def _deployed_weights(self) -> Iterator[None]:
        """The weights that the optimizer deploys; those of training come back to the bit."""
        if not isinstance(self.optimizer, ModalOptimizer):
            yield
            return
        parameters = [p.data for p in self._parameters.values()]
        training = [p.clone() for p in parameters]
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            torch._foreach_copy_(parameters, training)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        parameters = [p.data for p in self._parameters.values()]
        deployed = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, deployed)

    # -- snapshots ------------------------------------------------------------------------------------------------

    def snapshot(self) -> SessionSnapshot:
        """Everything that the job's future depends on; continuing after `restore` equals never having left."""
        return replace(self._copied_state(), best=self._best)

    def present_state(self) -> SessionSnapshot:
        """What `snapshot` gives, not copied: to be written to a file before the next step changes it."""
        self._check_can_snapshot()
        tensors = present_tensors(self._parameters, self.optimizer, self._average)
        return SessionSnapshot(tensors, self._position(), self._random_state, self._best)

    def _check_can_snapshot(self) -> None:
        if not self._can_snapshot:
            raise ValueError("snapshot: expected a session with its own AdamW, got another optimizer's")

    def _copied_state(self, device: torch.device | None = None) -> SessionSnapshot:
        self._check_can_snapshot()
        return take_snapshot(
            self._parameters, self.optimizer, self._average, self._position(), self._random_state, device=device
        )

    def restore(self, snapshot: SessionSnapshot, *, rewind: bool = True) -> None:
        """Returns to a snapshot.

        Args:
            snapshot: From `snapshot` of a session of the same job.
            rewind: Go back in the data, the budget and the loss scale too. A rollback during training does not: it
                takes weights, moments and random numbers back and moves on in the data.
        """
        position = restore_snapshot(snapshot, self._parameters, self.optimizer, self._average)
        self._random_state = {name: state.clone() for name, state in snapshot.random_state.items()}
        if rewind:
            self._best = snapshot.best
            self.step, self.tokens_trained = int(position["step"]), int(position["tokens_trained"])
            self.precision.load_state_dict(position)
            self._recorder.outliers.load_values(position)

    def _position(self) -> dict[str, float]:
        counts = {"step": self.step, "tokens_trained": self.tokens_trained}
        return counts | self.precision.state_dict() | self._recorder.outliers.values()

    def mark_best(self) -> None:
        """Keeps the present state as the one that `roll_back` returns to, in the host's memory."""
        self._best = self._copied_state(torch.device("cpu"))

    def roll_back(self) -> None:
        """Takes weights, moments and generators back to the best state; data and budget move on."""
        if self._best is None:
            raise ValueError("roll_back: expected mark_best to have been called, got no snapshot")
        self.restore(self._best, rewind=False)

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Runs with the job's random numbers (dropout) and leaves the global generators as they were."""
        with own_random_state(self._random_state, self.job.device):
            yield
            self._random_state = current_random_state(self.job.device)


@contextmanager
def own_random_state(state: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
    """Runs from a generator state and leaves the global generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.random.set_rng_state(state["cpu"])
        if devices:
            torch.cuda.set_rng_state(state["cuda"], device)
        yield


def current_random_state(device: torch.device) -> dict[str, Tensor]:
    """The global generators' states, by device type."""
    state = {"cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def seeded_random_state(seed: int, device: torch.device) -> dict[str, Tensor]:
    """The generator states that a seed means, without touching the global generators."""
    state = {"cpu": torch.Generator().manual_seed(seed).get_state()}
    if device.type == "cuda":
        state["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    return state
