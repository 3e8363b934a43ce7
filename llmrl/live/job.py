"""One job that somebody else runs, under a policy: measured at every optimizer step, decided on at a few of them.

The host calls `before_step` when the gradients of an optimizer step are ready and `after_step` when it was taken; the
learning rate of the next step stands in the optimizer from then on. State is tensors and plain values alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.momentum import LeaningStep
from llmrl_envs.interface.recorder import StatisticsRecorder
from llmrl_envs.interface.statistics import empty_statistics
from llmrl_envs.interface.tensor_sums import full_tensor
from llmrl_envs.jobs.layers import lower_half
from torch import Tensor, nn
from torch.nn import Parameter

from llmrl.decisions import Decision, DecisionLoop, DecisionRecord, interval_record
from llmrl.live.capabilities import Distribution, HostCapabilities, find_capabilities, find_distribution
from llmrl.live.generators import Generators
from llmrl.live.job_state import decision_state, restored_decision, to_arrays, to_tensors
from llmrl.live.labels import model_label_nats
from llmrl.live.optimizers import (
    RateSetter,
    check_measurable,
    check_optimizer,
    innermost,
    skip_unless,
    take_steps_again,
)
from llmrl.live.options import JobOptions
from llmrl.live.parameters import SteeredParameters, find_parameters, reshard
from llmrl.live.processes import Processes
from llmrl.live.snapshots import Snapshot, restore_state, state_tensors
from llmrl.policy import SchedulePolicy

_LOGGER = logging.getLogger("llmrl")
_PRESENT, _BEST = "present.", "best."


class LiveJob:
    """A job under way in a host.

    Args:
        policy: Decides.
        model: As it is trained, after it was prepared.
        optimizer: As the host steps it.
        options: How the job is steered.
        accelerator: The host's accelerator, if it has one.
        on_record: Called after each interval, on every process.

    Raises:
        UserError: The job cannot be steered.
    """

    def __init__(
        self,
        policy: SchedulePolicy,
        model: nn.Module,
        optimizer: Any,
        options: JobOptions,
        *,
        accelerator: Any = None,
        on_record: Callable[[DecisionRecord], None] | None = None,
    ) -> None:
        self._model = model
        self._optimizer = innermost(optimizer)
        self._accelerated = optimizer
        self._accelerator = accelerator
        self._options = options
        self._on_record = on_record
        self._source = check_optimizer(self._optimizer)
        self._rates = RateSetter(self._optimizer, options.base_rates)
        device = next(model.parameters()).device
        self._processes = Processes(device)
        distribution = find_distribution(model, accelerator, self._processes.world_size)
        check_measurable(self._source, steps_inside_backward=distribution is Distribution.DEEPSPEED)
        reshard(model)
        found = find_parameters(model, self._optimizer, distribution)
        self._parameters = found.by_name
        self._lower_half = frozenset(lower_half(tuple(found.by_name)))
        self._keeps_snapshots = options.snapshots and distribution is not Distribution.DEEPSPEED
        self.capabilities: HostCapabilities = find_capabilities(
            distribution,
            model,
            has_layers=bool(self._lower_half),
            max_grad_norm=options.max_grad_norm,
            keeps_snapshots=self._keeps_snapshots,
            is_adam=self._source == "moments" and isinstance(self._optimizer, torch.optim.Adam),
        )
        self.loop = self._make_loop(policy.for_model(model, found.num_parameters))
        self._recorder = self._make_recorder(found)
        path = options.snapshot_path
        self._snapshot = Snapshot(path and path.with_name(f"{path.name}-{self._processes.rank}.safetensors"))
        self._generators = Generators(device)
        self.step = options.first_step
        self._done = 0
        self._active: list[Parameter] = []  # only in the interval's last step
        self._interval_rates: list[float]
        self._limit: float
        self._frozen: bool
        self._momentum_share: float
        self._leaning = LeaningStep(self._optimizer)
        self._decision: Decision
        self._begin(found, model_label_nats(model))
        if self._processes.rank == 0:
            level = logging.INFO if policy.network is None else logging.WARNING
            _LOGGER.log(level, "llmrl: %s", self.capabilities.describe())
            if self.loop.policy is not policy:
                _LOGGER.warning("llmrl: %s keeps its level on such models: %s", policy.name, ", ".join(policy.holds_on))

    def _make_loop(self, policy: SchedulePolicy) -> DecisionLoop:
        options = self._options
        return DecisionLoop(
            policy,
            total_steps=options.total_steps,
            given_rate=self._rates.given_rate,
            settings=options.settings,
            capabilities=self.capabilities.choices,
            agree=self._processes.agree,
            guarded=options.guarded,
            first_step=options.first_step,
        )

    def _make_recorder(self, found: SteeredParameters) -> StatisticsRecorder:
        sharded = self.capabilities.distribution in (Distribution.FSDP2, Distribution.DEEPSPEED)
        return StatisticsRecorder(
            self._optimizer,
            device=self._processes.device,
            mode=found.mode,
            trainable_fraction=found.trainable_fraction,
            capacity_steps=max(self.loop.intervals),
            pairs=found.pairs,
            multipliers=self._rates.multipliers,
            source=self._source,
            sum_shards=self._processes.sum if sharded else None,
            flat_vectors=found.flat_vectors,
        )

    def _begin(self, found: SteeredParameters, label_nats: float) -> None:
        statistics = empty_statistics(
            np.array([self._options.total_steps]), np.array([int(found.mode)]), np.array([found.trainable_fraction])
        )
        statistics = replace(statistics, step=np.array([self.step], np.int64))
        parameters = tuple(self._parameters.values())
        norms = self._recorder.present_norms(parameters)
        if not (math.isfinite(norms[0]) and norms[0] > 0.0):
            norms = self._recorder.initial_norms(parameters)
        agreed = self._processes.mean(torch.tensor(norms, dtype=torch.float64))
        update_norm, weight_norm = agreed.tolist()
        self.loop.begin(statistics, update_norm, weight_norm, label_nats, found.num_parameters)
        self._decide()

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """The budget is used up."""
        return self.step >= self._options.total_steps

    @property
    def clipping_norm(self) -> float:
        """Norm that the next step's gradients are clipped to."""
        return self._limit

    def rates(self) -> list[float]:
        """The groups' rates of the next step."""
        return self._rates.rates(self._rate())

    def set_rates(self) -> None:
        """Writes the next step's rates into the optimizer."""
        self._rates.set(self._rate())

    def freeze(self) -> None:
        """Drops the gradients of what is frozen, so that its weights and moments stand still."""
        if self._frozen:
            for name in self._lower_half:
                self._parameters[name].grad = None

    def clip(self) -> Tensor | float | None:
        """Takes out the loss scale, clips what is not frozen, and returns the norm before clipping.

        DeepSpeed has clipped and stepped by now; its norm is returned, or None where it does not tell.
        """
        if self.capabilities.distribution is Distribution.DEEPSPEED:
            found: Tensor | float | None = self._accelerator.clip_grad_norm_((), self.clipping_norm)
            return found
        if self._accelerator is not None:
            self._accelerator.unscale_gradients(self._accelerated)
        self.freeze()
        active = [p for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(active, self.clipping_norm)
        return full_tensor(norm)

    def before_step(self, loss: Tensor | float, gradient_norm: Tensor | float | None) -> None:
        """Measures a step whose gradients are ready, and makes it do nothing where it is not finite or stands out.

        Args:
            loss: The step's mean loss on this process.
            gradient_norm: Global norm before clipping; None where the host does not tell.
        """
        if self.finished:
            return
        self._generators.end_step()
        loss = self._processes.mean(self._scalar(loss))
        norm = None if gradient_norm is None else self._scalar(gradient_norm)
        late = self.capabilities.distribution is Distribution.DEEPSPEED
        rate = self._rate()
        if self._done == self.loop.interval - 1:
            self._active = [p for p in self._parameters.values() if late or p.grad is not None]
            self._recorder.before_update(self._active, probe=True, learning_rate=rate)
        skips = not late and self.loop.schedule.skips_outliers()
        allowed = self._recorder.record_step(
            loss, norm, learning_rate=rate, max_gradient_norm=self.clipping_norm, skip_outliers=skips
        )
        if not late:
            scaled = getattr(self._accelerator, "scaler", None) is not None
            skip_unless(allowed, self._optimizer, self._parameters.values(), scaled=scaled)
            self.set_rates()
        self._leaning.begin(self._momentum_share)

    def measure_update(self) -> None:
        """Measures what the optimizer did; `after_step` does it where the host did not ask for it earlier."""
        self._leaning.end()
        self._recorder.after_update(self._active, probe=bool(self._active))
        self._active = []

    def after_step(self) -> None:
        """Counts a step that was taken; at an interval's end takes in what it measured and decides."""
        if self.finished:
            return
        self.measure_update()
        take_steps_again(self._optimizer)
        self.step += 1
        self._done += 1
        if self._done == self.loop.interval:
            self._close_interval()
        self.set_rates()
        if self._keeps_snapshots:
            self._generators.begin_step()

    def _close_interval(self) -> None:
        rate = self._interval_rates[-1]
        statistics = self._recorder.collect(
            step=self.step, total_steps=self._options.total_steps, reduce=self._processes.mean
        )
        update = self.loop.observe(statistics)
        if update.at_best[0] and self._keeps_snapshots:
            self._take_snapshot()
        rescued = bool(update.fell_back[0]) and self._snapshot.taken
        if rescued:
            self._roll_back()
        record = interval_record(self.loop, self._decision, statistics, update, learning_rate=rate, rescued=rescued)
        if self._on_record is not None:
            self._on_record(record)
        self._done = 0
        if not self.finished:
            self._decide()
            if self._decision.rollback:
                self._roll_back()

    def validated(self, loss: float, num_targets: int | None = None) -> dict[str, bool]:
        """Takes in a validation loss that the host has measured between two steps.

        Args:
            loss: Nats per target, of this process's examples.
            num_targets: Targets of all processes; None where it is not known.

        Returns:
            What the guard did, as in a record's events.
        """
        verdict = self.loop.validated(float(self._processes.mean(self._scalar(loss))), num_targets)
        if verdict.at_best[0] and self._keeps_snapshots:
            self._take_snapshot()
        if not verdict.turned[0]:
            return {}
        rescued = self._snapshot.taken
        if rescued:
            self._roll_back()
        if not self.finished:
            self._look_ahead()
            self.set_rates()
        if self._processes.rank == 0:
            way = "from its best state" if rescued else "from where it is: no snapshots are kept"
            _LOGGER.warning("llmrl: the validation loss has turned at step %d; a lower rate, %s", self.step, way)
        return {"fallback": True, "rollback": True} if rescued else {"fallback": True}

    def _take_snapshot(self) -> None:
        # Everyone's, because a checkpoint may be written by the first process for all.
        states = {name: self._processes.gather(state) for name, state in self._generators.states().items()}
        self._snapshot.take(self._parameters, self._optimizer, states)
        self.loop.schedule.has_snapshot[:] = True

    def _roll_back(self) -> None:
        reshard(self._model)
        states = self._snapshot.restore(self._parameters, self._optimizer)
        rank = self._processes.rank
        self._generators.restore({name: everyone[rank] for name, everyone in states.items() if rank < len(everyone)})

    def _decide(self) -> None:
        self._decision = self.loop.decide()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Works out what the steps of the decision's interval are asked for several times each."""
        self._interval_rates = self.loop.learning_rates(self.step - self._done)
        self._limit = self._options.max_grad_norm * float(self.loop.schedule.clipping_factor()[0])
        self._frozen = bool(self.loop.schedule.frozen[0])
        self._momentum_share = float(self.loop.schedule.momentum_share()[0])

    def _rate(self) -> float:
        """The next step's common rate."""
        return 0.0 if self.finished else self._interval_rates[self._done]

    def _scalar(self, value: Tensor | float) -> Tensor:
        device = self._processes.device
        if isinstance(value, Tensor):
            return full_tensor(value.detach()).to(device, torch.float32).reshape(())
        return torch.tensor(float(value), device=device)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the job's later decisions depend on, as tensors and plain values."""
        state: dict[str, Any] = {
            "step": self.step,
            "done": self._done,
            "total_steps": self._options.total_steps,
            "intervals": list(self.loop.intervals),
            "policy": self._policy_digest(),
            "multipliers": list(self._rates.multipliers),
            "loop": to_tensors(self.loop.state_dict()),
            "recorder": self._recorder.state_dict(),
            "generators": list(self._generators.own),
            "decision": decision_state(self._decision),
        }
        if self._snapshot.taken and self.capabilities.distribution is not Distribution.FSDP2:
            state["snapshot"] = {name: tensor.cpu() for name, tensor in self._snapshot.tensors().items()}
        return state

    def share(self) -> dict[str, Tensor]:
        """This process's part of the weights, of the optimizer's state and of the best snapshot, not copied.

        For hosts whose processes write a checkpoint each for themselves, before the next step.
        """
        share = {_PRESENT + name: t for name, t in state_tensors(self._parameters, self._optimizer).items()}
        if self._snapshot.taken:
            share |= {_BEST + name: tensor for name, tensor in self._snapshot.tensors().items()}
        return share

    def load_share(self, share: Mapping[str, Tensor]) -> None:
        """Restores what `share` gave; call before `load_state_dict`."""
        reshard(self._model)
        parts = {
            prefix: {name.removeprefix(prefix): t for name, t in share.items() if name.startswith(prefix)}
            for prefix in (_PRESENT, _BEST)
        }
        restore_state(parts[_PRESENT], self._parameters, self._optimizer)
        if parts[_BEST] and self._keeps_snapshots:
            self._snapshot.put(parts[_BEST])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, and sets the rates of the step that comes next.

        Raises:
            UserError: It is the state of a job of another length, or under another policy.
        """
        for name, mine in (("total_steps", self._options.total_steps), ("policy", self._policy_digest())):
            if state[name] != mine:
                raise UserError(
                    "the checkpoint is of a job that was steered differently",
                    where=f"the controller's state, {name}",
                    expected=str(mine),
                    got=state[name],
                )
        self.step, self._done = int(state["step"]), int(state["done"])
        self.loop.intervals = tuple(state["intervals"])
        self.loop.load_state_dict(to_arrays(state["loop"]))
        self._recorder.resize(max(self.loop.intervals))
        self._recorder.load_state_dict(state["recorder"])
        self._generators.keep(state["generators"])
        self._decision = restored_decision(state["decision"])
        self._look_ahead()
        if "snapshot" in state and self._keeps_snapshots:
            self._snapshot.put({name: t.to(self._processes.device) for name, t in state["snapshot"].items()})
        self.loop.schedule.has_snapshot[:] = self._snapshot.taken
        self.set_rates()

    def _policy_digest(self) -> str:
        return f"{self.loop.policy.name} {self.loop.policy.digest}"
