"""Jobs of any models side by side: one population for each model and mode, jobs come and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from llmrl_envs.jobs.loading import Job, JobLibrary
from llmrl_envs.jobs.passes import Evaluation
from llmrl_envs.jobs.population.members import IntervalPlan, IntervalResult, Member
from llmrl_envs.jobs.population.session import PopulationSession
from llmrl_envs.jobs.precision import resolve_precision
from llmrl_envs.jobs.task import FineTuningTask

_Value = TypeVar("_Value")


class PopulationPool:
    """Populations by kind of job. A job joins the population of its model, mode, adapters, head and number format.

    Args:
        library: Loads models and data.
        level_norm: As for `FineTuningSession`.
        averaged: Keep averaged weights of every job.
    """

    def __init__(self, library: JobLibrary, *, level_norm: str = "effective", averaged: bool = False) -> None:
        self.library = library
        self._level_norm = level_norm
        self._averaged = averaged
        self.sessions: dict[str, PopulationSession] = {}
        self._session_of: dict[Member, PopulationSession] = {}

    def session(self, job: Job) -> PopulationSession:
        """The population that a job belongs to, made when the first one needs it."""
        key = kind_key(job)
        if key not in self.sessions:
            self.sessions[key] = PopulationSession(job, level_norm=self._level_norm, averaged=self._averaged)
        return self.sessions[key]

    def session_of(self, member: Member) -> PopulationSession:
        """The population of a job under way."""
        return self._session_of[member]

    def add(self, job: Job, seed: int, *, average_steps: float = 0.0) -> Member:
        """Begins a job; see `PopulationSession.add`."""
        session = self.session(job)
        member = session.add(job, seed, average_steps=average_steps)
        self._session_of[member] = session
        return member

    def remove(self, member: Member) -> None:
        """Ends a job."""
        self._session_of.pop(member).remove(member)

    def clear(self, seed: int) -> None:
        """Ends all jobs and seeds dropout anew; models stay loaded."""
        for member in list(self._session_of):
            self.remove(member)
        for session in self.sessions.values():
            session.reseed(seed)

    def run_interval(self, plans: Sequence[IntervalPlan]) -> list[IntervalResult]:
        """Trains jobs for an interval each, one population after the other."""
        return self._by_session(
            [plan.member for plan in plans], plans, lambda session, some: session.run_interval(some)
        )

    def evaluate(self, members: Sequence[Member], split: str, averaged: Sequence[bool]) -> list[Evaluation]:
        """Losses of jobs on the fixed subset of a split; see `PopulationSession.evaluate`."""
        pairs = list(zip(members, averaged, strict=True))
        return self._by_session(
            members,
            pairs,
            lambda session, some: session.evaluate([pair[0] for pair in some], split, [pair[1] for pair in some]),
        )

    def mark_best(self, members: Sequence[Member]) -> None:
        """Keeps the present states of jobs as those that `roll_back` returns to."""
        for session in self.sessions.values():
            session.mark_best([member for member in members if self._session_of[member] is session])

    def roll_back(self, members: Sequence[Member]) -> None:
        """Takes jobs back to their best states."""
        for session in self.sessions.values():
            session.roll_back([member for member in members if self._session_of[member] is session])

    def parameters(self, member: Member) -> dict[str, Tensor]:
        """A job's trained parameters by name, as views."""
        return self._session_of[member].parameters(member)

    def _by_session(
        self,
        members: Sequence[Member],
        arguments: Sequence[Any],
        call: Callable[[PopulationSession, list[Any]], list[_Value]],
    ) -> list[_Value]:
        found: dict[int, _Value] = {}
        for session in self.sessions.values():
            places = [place for place, member in enumerate(members) if self._session_of[member] is session]
            if places:
                found |= zip(places, call(session, [arguments[place] for place in places]), strict=True)
        return [found[place] for place in range(len(members))]

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, names: dict[Member, int]) -> list[dict[str, Any]]:
        """Where every job stands.

        Args:
            names: A number for each job, by which `load_state_dict` knows it again.
        """
        return [
            {"names": [names[member] for member in session.members], **session.state_dict()}
            for session in self.sessions.values()
            if session.members
        ]

    def load_state_dict(
        self, state: Sequence[dict[str, Any]], tasks: dict[int, tuple[FineTuningTask, int]]
    ) -> dict[int, Member]:
        """Goes on where `state_dict` was called.

        Args:
            state: What it gave.
            tasks: Task and seed of each job, by number.

        Returns:
            The jobs, by number.
        """
        self.clear(0)
        found: dict[int, Member] = {}
        for part in state:
            for name in part["names"]:
                task, seed = tasks[name]
                found[name] = self.add(self.library.job(task), seed)
            self._session_of[found[part["names"][0]]].load_state_dict(part)
        return found


def kind_key(job: Job) -> str:
    """What jobs of one population share."""
    task = job.task
    kind = {
        "model": task.model,
        "num_labels": job.data.num_labels if task.objective == "classification" else None,
        "mode": task.mode,
        "lora": task.lora.model_dump_json() if task.mode == "lora" else None,
        "precision": resolve_precision(task.precision, job.device),
    }
    return repr(kind)
