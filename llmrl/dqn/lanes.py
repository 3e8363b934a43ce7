"""One view on Gymnasium environments: E lanes that are stepped together, whatever resets them.

A single environment is one lane. A vector environment may reset a lane that ended in the same step (SAME_STEP), in the
next one (NEXT_STEP, whose action does nothing), or not at all (DISABLED). Behind this view they all tell the same:
the true final observation of an episode, and the first observation of the next one when it is acted on.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

Info = dict[str, Any]
FLAG = {value: np.frombuffer(bytes([value]), dtype=np.bool_) for value in (False, True)}  # [1], read-only


class Step(NamedTuple):
    """What one step of all lanes brought."""

    reward: NDArray[np.float64]  # [E]
    terminated: NDArray[np.bool_]  # [E]
    truncated: NDArray[np.bool_]  # [E]
    next_obs: NDArray[Any]  # [E, *shape]; the final observation where an episode ended
    next_mask: NDArray[np.bool_]  # [E, A]
    valid: NDArray[np.bool_] | None  # [E]; False where the step only began an episode; None = all valid
    info: Info  # of the environment
    final_info: Info  # where the entries of lanes that ended are


class Lanes(Protocol):
    """E lanes of environments."""

    num_envs: int
    num_actions: int
    in_episode: NDArray[np.bool_]  # [E] lanes whose episode has begun and not ended

    def begin(self, episodes: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Begins episodes where none is under way; returns what to act on: obs [E, *shape] and mask [E, A].

        Args:
            episodes: [E] numbers of the episodes that would begin; seeds come from them.
        """

    def step(self, action: NDArray[np.int64]) -> Step:
        """Steps every lane."""

    def state_dict(self) -> dict[str, Any] | None:
        """Where the environments stand, or None where they cannot tell."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""


def make_lanes(env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any], seed: int) -> Lanes:
    """The view on a single or a vector environment.

    Raises:
        ValueError: The action space is not `Discrete` from 0, or the autoreset mode is unknown.
    """
    if isinstance(env, VectorEnv):
        return VectorLanes(env, seed)
    return SingleLane(env, seed)


def episode_seed(seed: int, episode: int) -> int:
    """The seed of an episode: the same for the same run and number, unrelated between numbers."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


class SingleLane:
    """A single environment; every episode is reset with a seed of its own, when it is about to be acted on."""

    num_envs = 1

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        self.env = env
        self.seed = seed
        self.num_actions = _num_actions(env.action_space)
        self.in_episode = np.zeros(1, dtype=np.bool_)
        self._all_valid = np.ones((1, self.num_actions), dtype=np.bool_)
        self._obs: NDArray[Any] = np.zeros((1, 0))
        self._mask = self._all_valid

    def begin(self, episodes: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Resets after the end of an episode."""
        if not self.in_episode[0]:
            obs, info = self.env.reset(seed=episode_seed(self.seed, int(episodes[0])))
            self._obs, self._mask = _as_obs(obs)[None], self._read_mask(info)
            self.in_episode = np.ones(1, dtype=np.bool_)
        return self._obs, self._mask

    def step(self, action: NDArray[np.int64]) -> Step:
        """Steps the environment."""
        obs, reward, terminated, truncated, info = self.env.step(action.item())
        self._obs, self._mask = _as_obs(obs)[None], self._read_mask(info)
        self.in_episode = FLAG[not (terminated or truncated)]
        return Step(
            np.array([reward], dtype=np.float64),
            FLAG[bool(terminated)],
            FLAG[bool(truncated)],
            self._obs,
            self._mask,
            None,
            info,
            info,
        )

    def state_dict(self) -> dict[str, Any] | None:
        """Nothing but the episode's number is needed between episodes; within one, the environment's own state."""
        if not self.in_episode[0]:
            return {"in_episode": [False]}
        inner = _env_state(self.env)
        return None if inner is None else {**inner, **_pack(self._obs, self._mask), "in_episode": [True]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on between two episodes, or within one if the environment can."""
        self.in_episode = np.array(state["in_episode"], dtype=np.bool_)
        if self.in_episode[0]:
            self.env.reset(seed=0)
            _load_env_state(self.env, state)
            self._obs, self._mask = _unpack(state)

    def _read_mask(self, info: Info) -> NDArray[np.bool_]:
        mask = info.get("action_mask")
        return self._all_valid if mask is None else np.asarray(mask).astype(np.bool_)[None]


class VectorLanes:
    """A vector environment in any of the three autoreset modes."""

    def __init__(self, env: VectorEnv[Any, Any, Any], seed: int) -> None:
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(f"vector environment: expected metadata['autoreset_mode'] (AutoresetMode), got {mode!r}")
        self.env = env
        self.mode = mode
        self.seed = seed
        self.num_envs = env.num_envs
        self.num_actions = _num_actions(env.single_action_space)
        self.in_episode = np.zeros(self.num_envs, dtype=np.bool_)
        self._all_valid = np.ones((self.num_envs, self.num_actions), dtype=np.bool_)
        self._started = False
        self._obs: NDArray[Any] = np.zeros((self.num_envs, 0))
        self._mask = self._all_valid

    def begin(self, episodes: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Resets everything at the start, and with autoreset disabled the lanes that ended."""
        if not self._started:
            obs, info = self.env.reset(seed=episode_seed(self.seed, int(episodes[0])))
            self._obs, self._mask = _as_obs(obs), self._read_mask(info)
            self._started = True
            self.in_episode = np.ones(self.num_envs, dtype=np.bool_)
        elif self.mode is AutoresetMode.DISABLED and not self.in_episode.all():
            ended = ~self.in_episode
            obs, info = self.env.reset(options={"reset_mask": ended})
            self._obs = _as_obs(obs)
            self._mask = np.where(ended[:, None], self._read_mask(info), self._mask)
            self.in_episode = np.ones(self.num_envs, dtype=np.bool_)
        return self._obs, self._mask

    def step(self, action: NDArray[np.int64]) -> Step:
        """Steps all environments."""
        resetting = ~self.in_episode  # only with NEXT_STEP: this step resets them and ignores their action
        obs, reward, terminated, truncated, info = self.env.step(action)
        ended = np.asarray(terminated | truncated)
        self._obs, self._mask = _as_obs(obs), self._read_mask(info)
        next_obs, next_mask, final_info = self._obs, self._mask, info
        if self.mode is AutoresetMode.SAME_STEP and ended.any():
            next_obs, next_mask, final_info = self._final(ended, info)
            self.in_episode = np.ones(self.num_envs, dtype=np.bool_)
        else:
            self.in_episode = ~ended
        return Step(
            np.asarray(reward, dtype=np.float64),
            np.asarray(terminated, dtype=np.bool_),
            np.asarray(truncated, dtype=np.bool_),
            next_obs,
            next_mask,
            ~resetting if resetting.any() else None,
            info,
            final_info,
        )

    def state_dict(self) -> dict[str, Any] | None:
        """The environment's own state beside what is acted on next; None before it was begun or if it has none."""
        inner = _env_state(self.env) if self._started else None
        if inner is None:
            return None
        return {**inner, **_pack(self._obs, self._mask), "in_episode": self.in_episode.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on within the episodes."""
        _load_env_state(self.env, state)
        self._obs, self._mask = _unpack(state)
        self.in_episode = np.array(state["in_episode"], dtype=np.bool_)
        self._started = True

    def _read_mask(self, info: Info) -> NDArray[np.bool_]:  # [E, A]
        mask = info.get("action_mask")
        if mask is None:
            return self._all_valid
        present = np.asarray(info.get("_action_mask", np.ones(self.num_envs, dtype=np.bool_)))
        return np.where(present[:, None], np.asarray(mask).astype(np.bool_), True)

    def _final(self, ended: NDArray[np.bool_], info: Info) -> tuple[NDArray[Any], NDArray[np.bool_], Info]:
        """Observation, mask and info of the last step of episodes that ended and were reset at once."""
        next_obs = self._obs.copy()
        for lane in np.flatnonzero(ended):
            next_obs[lane] = info["final_obs"][lane]
        final_info = info.get("final_info", {})
        next_mask = np.where(ended[:, None], self._read_mask(final_info), self._mask)
        return next_obs, next_mask, final_info


def lane_info(info: Info, lane: int) -> Info:
    """The entries that one lane of a vector environment has in `info` (`_key` says which lanes have `key`)."""
    found: Info = {}
    for key, value in info.items():
        present = info.get(f"_{key}")
        if key.startswith("_") or (present is not None and not present[lane]):
            continue
        found[key] = lane_info(value, lane) if isinstance(value, dict) else value[lane]
    return found


def _num_actions(space: gymnasium.Space[Any]) -> int:
    if not isinstance(space, spaces.Discrete) or space.start != 0:
        raise ValueError(f"action space: expected Discrete(A) that starts at 0, got {space}")
    return int(space.n)


def _as_obs(obs: Any) -> NDArray[Any]:
    """Images stay uint8, everything else becomes float32; a copy, because environments reuse their arrays."""
    array = np.asarray(obs)
    return array.astype(np.uint8 if array.dtype == np.uint8 else np.float32)


def _env_state(env: Any) -> dict[str, Any] | None:
    save = getattr(env.unwrapped, "state_dict", None)
    return None if save is None else {"env": save()}


def _load_env_state(env: Any, state: dict[str, Any]) -> None:
    load = getattr(env.unwrapped, "load_state_dict", None)
    if load is None:
        raise ValueError(f"environment state: expected an environment with load_state_dict, got {env}")
    load(state["env"])


def _pack(obs: NDArray[Any], mask: NDArray[np.bool_]) -> dict[str, Any]:
    return {"obs": obs.tolist(), "obs_dtype": str(obs.dtype), "mask": mask.tolist()}


def _unpack(state: dict[str, Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    return np.array(state["obs"], dtype=state["obs_dtype"]), np.array(state["mask"], dtype=np.bool_)
