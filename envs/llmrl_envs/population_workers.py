"""A population cut into parts that worker processes train side by side, one core each.

The operations of a small model are too short for a second thread, so that a pass leaves a machine's other cores idle;
passes of several processes do not. Lanes, draws and reference curves are the caller's; a worker knows its own lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl_envs.fine_tuning_settings import DrawnJob, FineTuningSettings
from llmrl_envs.interface.statistics import Integers
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import FineTuningTask
from llmrl_envs.population_episodes import PopulationEpisodes, StepResult
from llmrl_envs.worker_process import WorkerProcess, ask_all

Curves = dict[str, tuple[float, ...]]


class PopulationWorkers:
    """`PopulationEpisodes` of P lanes in W processes, each with a run of neighbouring lanes.

    Args:
        num_envs: P.
        settings: What the environment was made with.
        library: Keeps the curves of reference runs; models and data are loaded by the workers.
        num_workers: W.
        level_norm: As for `FineTuningSession`.
        group_size: Lanes of a group; a group stays in one process.
    """

    def __init__(
        self,
        num_envs: int,
        settings: FineTuningSettings,
        library: JobLibrary,
        num_workers: int,
        *,
        level_norm: str = "effective",
        group_size: int = 1,
    ) -> None:
        self.num_envs = num_envs
        self._library = library
        self._key = settings.reference_key
        self._starts = worker_lanes(num_envs, group_size, num_workers)
        self._drawn: list[DrawnJob | None] = [None] * num_envs
        device = str(library.device)
        self._workers = [
            WorkerProcess(_Part, stop - start, settings, device, level_norm, group_size)
            for start, stop in self._ranges()
        ]
        for worker in self._workers:
            worker.answer()

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self._workers)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()

    # -- beginning ------------------------------------------------------------------------------------------------

    def clear(self, seed: int) -> None:
        """Ends all episodes; the dropout of each worker is that of a population seeded as its first lane is."""
        self._ask("clear", [seed + start for start, _ in self._ranges()])
        self._drawn = [None] * self.num_envs

    def drawn(self, lane: int) -> DrawnJob:
        """What a lane's episode was begun with."""
        found = self._drawn[lane]
        if found is None:
            raise ValueError("expected reset() before anything else, got neither")
        return found

    def parameters(self, lane: int) -> dict[str, Tensor]:
        """The trained parameters of a lane's job, copied."""
        worker = int(np.searchsorted(self._starts, lane, side="right")) - 1
        self._workers[worker].ask("parameters", lane - self._starts[worker])
        arrays: dict[str, NDArray[Any]] = self._workers[worker].answer()
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def rehearse(self, task: FineTuningTask) -> int:
        """Runs one step of P jobs of a task; how many went through models at once, all workers together."""
        self._drawn = [None] * self.num_envs
        return int(sum(self._ask("rehearse", [task] * self.num_workers)))

    def lacks_reference(self, drawn: Sequence[DrawnJob]) -> bool:
        """Whether a reference run of one of these jobs has not been made."""
        return any(self._key(job) not in self._library.curves for job in drawn)

    def make_references(self, drawn: Sequence[DrawnJob]) -> None:
        """Makes the reference runs of jobs that lack them, evenly divided among the workers."""
        missing = {self._key(job): job for job in drawn if self._key(job) not in self._library.curves}
        jobs = list(missing.values())
        for curves in self._ask(
            "make_references", [jobs[part :: self.num_workers] for part in range(self.num_workers)]
        ):
            self._library.curves.update(curves)

    def begin(self, lanes: Sequence[int], drawn: Sequence[DrawnJob]) -> NDArray[np.float32]:  # [len(lanes), O]
        """Starts one job in each of `lanes`, whose reference runs have been made; returns their first observations."""
        for lane, job in zip(lanes, drawn, strict=True):
            self._drawn[lane] = job
        parts = [[place for place, lane in enumerate(lanes) if start <= lane < stop] for start, stop in self._ranges()]
        begun = [
            ([lanes[place] - start for place in part], [drawn[place] for place in part], self._curves_of(drawn, part))
            for part, start in zip(parts, self._starts, strict=True)
        ]
        found = self._ask("begin", *(list(column) for column in zip(*begun, strict=True)))
        obs = np.concatenate([own for own in found if own is not None])
        order = np.argsort(np.concatenate([np.array(part, np.int64) for part in parts]))
        return np.asarray(obs[order])

    def _curves_of(self, drawn: Sequence[DrawnJob], places: Sequence[int]) -> Curves:
        keys = {self._key(drawn[place]) for place in places}
        return {key: self._library.curves[key] for key in sorted(keys)}

    # -- stepping -------------------------------------------------------------------------------------------------

    def step(self, actions: Integers) -> StepResult:
        """Carries out one action in each lane and trains for one interval.

        Raises:
            ValueError: There is not one action of the table for each lane.
        """
        if np.shape(actions) != (self.num_envs,):
            raise ValueError(f"actions: expected int64[{self.num_envs}], got shape {list(np.shape(actions))}")
        results: list[StepResult] = self._ask("step", [actions[start:stop] for start, stop in self._ranges()])
        return StepResult(
            np.concatenate([result.obs for result in results]),
            np.concatenate([result.reward for result in results]),
            np.concatenate([result.terminated for result in results]),
            _joined([result.events for result in results]),
        )

    def info(self) -> dict[str, NDArray[Any]]:
        """Facts of every lane, arrays of leading dimension P, all of them new."""
        return _joined(self._ask("info"))

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where every episode stands, by worker: JSON values and NumPy arrays."""
        parts = self._ask("state_dict")
        curves = {key: list(curve) for key, curve in self._library.curves.items()}
        return {"workers": [{**part, "curves": {}} for part in parts], "curves": curves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` of as many workers was called."""
        self._library.curves.update({key: tuple(curve) for key, curve in state["curves"].items()})
        parts = [{**part, "curves": state["curves"]} for part in state["workers"]]
        self._ask("load_state_dict", parts)
        self._drawn = [DrawnJob.from_state(lane["drawn"]) for part in parts for lane in part["lanes"]]

    def _ask(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        return ask_all(self._workers, method, *arguments)

    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, [*self._starts[1:], self.num_envs], strict=True))


def worker_lanes(num_envs: int, group_size: int, num_workers: int) -> list[int]:
    """First lane of each worker: whole groups, their numbers differing by one at most."""
    groups = num_envs // group_size
    return [part * groups // num_workers * group_size for part in range(num_workers)]


def num_saved_workers(state: Mapping[str, Any]) -> int:
    """Workers of the population that a state of episodes was saved from."""
    return len(state["workers"]) if "workers" in state else 1


def _joined(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Part:
    """The lanes of one worker, in its process."""

    def __init__(
        self, num_envs: int, settings: FineTuningSettings, device: str, level_norm: str, group_size: int
    ) -> None:
        torch.set_num_threads(1)
        self._library = JobLibrary(device)
        self._key = settings.reference_key
        self._episodes = PopulationEpisodes(
            num_envs, settings, self._library, level_norm=level_norm, group_size=group_size
        )
        # As they are.
        self.clear, self.rehearse, self.step = self._episodes.clear, self._episodes.rehearse, self._episodes.step
        self.info, self.state_dict = self._episodes.info, self._episodes.state_dict
        self.load_state_dict = self._episodes.load_state_dict

    def make_references(self, drawn: Sequence[DrawnJob]) -> Curves:
        """The curves of jobs."""
        self._episodes.make_references(drawn)
        return self._curves_of(drawn)

    def begin(
        self, lanes: Sequence[int], drawn: Sequence[DrawnJob], curves: Curves
    ) -> NDArray[np.float32] | None:  # [len(lanes), O]
        """Starts jobs with the curves of their references; nothing where there are none."""
        self._library.curves.update(curves)
        return self._episodes.begin(lanes, drawn) if lanes else None

    def parameters(self, lane: int) -> dict[str, NDArray[Any]]:
        """The trained parameters of a lane's job."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self._episodes.parameters(lane).items()}

    def _curves_of(self, drawn: Sequence[DrawnJob]) -> Curves:
        return {key: self._library.curves[key] for key in map(self._key, drawn)}
