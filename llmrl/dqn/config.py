"""Every knob of the DQN, checked before anything runs; importable without torch.

Each feature is one flag, so that an ablation changes one line. `DQNConfig.preset("nature")` is the plain agent,
`DQNConfig.preset("default")` the one to start from. `NetworkConfig` is what a saved network needs to be rebuilt.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

PresetName = Literal["nature", "default"]

# 0.01 in Mnih et al. 2015, whose gradients are sums over 32 transitions where ours are means.
PUBLISHED_RMSPROP_EPSILON = 0.01 / 32**2


Margin: TypeAlias = Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...]
"""By how much an action's Q must exceed the default action's: one number, or one for each action."""


class NetworkConfig(BaseModel):
    """Shape of a Q-network; plain JSON, stored beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    obs_shape: tuple[int, ...] = Field(min_length=1, description="[O] for vectors, [C, H, W] for images")
    num_actions: int = Field(ge=1)
    torso: Literal["mlp", "cnn"] = "mlp"
    hidden_sizes: tuple[int, ...] = (128, 128)
    layer_norm: bool = False
    dueling: bool = False
    noisy: bool = False
    noisy_scale: float = Field(default=0.5, gt=0)
    branches: tuple[int, ...] | None = None
    head: Literal["expected", "categorical", "quantile"] = "expected"
    num_atoms: int = Field(default=51, ge=2)
    value_min: float = -10.0
    value_max: float = 10.0
    num_quantiles: int = Field(default=32, ge=1)
    cvar_level: float = Field(default=1.0, gt=0, le=1)
    normalize_obs: bool = False
    default_action: int | None = Field(default=None, ge=0)
    default_action_margin: Margin = 0.0

    @model_validator(mode="after")
    def _check(self) -> NetworkConfig:
        if min(self.obs_shape) < 1:
            raise ValueError(f"obs_shape: expected positive sizes, got {self.obs_shape}")
        if self.hidden_sizes and min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes: expected positive sizes, got {self.hidden_sizes}")
        if self.torso == "cnn" and len(self.obs_shape) != 3:
            raise ValueError(f"torso 'cnn': expected obs_shape [C, H, W], got {self.obs_shape}")
        if self.value_min >= self.value_max:
            raise ValueError(f"expected value_min < value_max, got {self.value_min} >= {self.value_max}")
        if self.default_action is not None and self.default_action >= self.num_actions:
            raise ValueError(
                f"default_action: expected below num_actions={self.num_actions}, got {self.default_action}"
            )
        if isinstance(self.default_action_margin, tuple):
            self._check_margins(self.default_action_margin)
        if self.branches is not None:
            if self.head != "expected":
                raise ValueError(f"branches: expected head 'expected', got {self.head!r}")
            if math.prod(self.branches) != self.num_actions:
                raise ValueError(
                    f"branches: expected sizes whose product is num_actions={self.num_actions}, got {self.branches}"
                )
        return self

    def _check_margins(self, margins: tuple[float, ...]) -> None:
        default = self.default_action
        if len(margins) != self.num_actions or default is None or margins[default] != 0.0:
            raise ValueError(
                "default_action_margin: expected one number, or a default_action and one for each of"
                f" {self.num_actions} actions, 0 for the default one; got {margins} with default_action {default}"
            )


class DQNConfig(BaseModel):
    """All settings of the DQN agent. Steps are environment steps unless the name says learner steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Network. Dueling: https://arxiv.org/abs/1511.06581. LayerNorm: https://arxiv.org/abs/2407.04811.
    # Noisy layers: https://arxiv.org/abs/1706.10295. Branches: https://arxiv.org/abs/1711.08946, 2210.12566.
    torso: Literal["mlp", "cnn"] = "mlp"
    hidden_sizes: tuple[int, ...] = Field((128, 128), description="widths of the fully connected hidden layers")
    layer_norm: bool = Field(True, description="LayerNorm before every hidden activation")
    dueling: bool = Field(True, description="Q = V + A - mean A")
    noisy: bool = Field(False, description="factorised Gaussian noise on the fully connected layers")
    noisy_scale: float = Field(0.5, gt=0, description="sigma_0 of the noisy layers")
    branches: tuple[int, ...] | None = Field(None, description="sizes of the factors of the action; product = actions")
    normalize_obs: bool = Field(False, description="standardise observations with running statistics")
    normalize_obs_steps: int = Field(10_000, ge=1, description="the statistics stop moving after so many steps")
    ignored_obs: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="positions of a vector observation that the network is blind to; needs normalize_obs"
    )

    # Value distribution. C51: https://arxiv.org/abs/1707.06887. QR-DQN: https://arxiv.org/abs/1710.10044.
    # Acting on the lower tail: https://arxiv.org/abs/1806.06923.
    head: Literal["expected", "categorical", "quantile"] = "expected"
    num_atoms: int = Field(51, ge=2)
    value_min: float = Field(-10.0, description="lowest return of the categorical head")
    value_max: float = Field(10.0, description="highest return of the categorical head")
    num_quantiles: int = Field(32, ge=1)
    cvar_level: float = Field(1.0, gt=0, le=1, description="act on the mean of this lowest share of the returns")

    # Target. Double: https://arxiv.org/abs/1509.06461. n-step: https://arxiv.org/abs/1710.02298.
    # Annealed n and gamma: https://arxiv.org/abs/2305.19452. Munchausen: https://arxiv.org/abs/2007.14430.
    double: bool = True
    n_step: int = Field(3, ge=1)
    n_step_end: int | None = Field(None, ge=1, description="n falls or rises geometrically to this value")
    gamma: float = Field(0.99, ge=0, le=1)
    gamma_end: float | None = Field(None, ge=0, le=1, description="gamma moves to this value, geometric in 1 - gamma")
    horizon_learner_steps: int = Field(10_000, ge=1, description="learner steps over which n and gamma move")
    target_update_period: int = Field(1, ge=1, description="learner steps between two updates of the target network")
    target_ema: float = Field(0.005, gt=0, le=1, description="share of the online network in an update; 1 copies")
    munchausen: bool = False
    munchausen_scale: float = Field(0.9, ge=0, le=1)
    munchausen_temperature: float = Field(0.03, gt=0)
    munchausen_clip: float = Field(-1.0, le=0, description="lower bound of the scaled log-policy")

    # Loss. Conservative term: https://arxiv.org/abs/2006.04779.
    loss: Literal["huber", "squared"] = "huber"
    huber_delta: float = Field(1.0, gt=0)
    reward_clip: float | None = Field(None, gt=0, description="rewards are clipped to +- this before n-step sums")
    reward_scale: float = Field(1.0, gt=0)
    reward_shift: float = Field(0.0, description="added to every reward after scaling")
    conservative_weight: float = Field(0.0, ge=0, description="weight of logsumexp(Q) - Q(a); for learning from logs")

    # Optimizer.
    optimizer: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = Field(3e-4, gt=0)
    learning_rate_end: float | None = Field(None, ge=0, description="linear decay of the rate to this value")
    learning_rate_decay_steps: int = Field(50_000, ge=1, description="learner steps of that decay")
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = Field(1e-8, gt=0)
    rmsprop_decay: float = Field(0.95, gt=0, lt=1)
    rmsprop_epsilon: float = Field(PUBLISHED_RMSPROP_EPSILON, gt=0, description="added to the gradient's variance")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on weight matrices only")
    max_grad_norm: float | None = Field(10.0, gt=0)

    # Replay. Prioritised: https://arxiv.org/abs/1511.05952. LAP: https://arxiv.org/abs/2007.06049.
    replay_capacity: int = Field(100_000, ge=1)
    batch_size: int = Field(128, ge=1)
    learning_starts: int = Field(1_000, ge=1, description="environment steps before the first update")
    replay_ratio: float = Field(1.0, gt=0, description="learner steps per environment step")
    sampling: Literal["uniform", "prioritized", "lap"] = "uniform"
    priority_exponent: float = Field(0.6, ge=0, le=1)
    importance_exponent: float = Field(0.4, ge=0, le=1, description="beta at the start")
    importance_exponent_end: float = Field(1.0, ge=0, le=1)
    importance_learner_steps: int = Field(50_000, ge=1, description="learner steps over which beta moves")

    # Resets. https://arxiv.org/abs/2205.07802; shrink and perturb: https://arxiv.org/abs/1910.08475.
    reset_period: int = Field(0, ge=0, description="learner steps between two resets; 0 never resets")
    reset_scope: Literal["head", "all"] = "head"
    reset_keep: float = Field(0.0, ge=0, lt=1, description="share of the old weights that a reset keeps")
    reset_until_learner_steps: int | None = Field(None, ge=0, description="no reset after this learner step")

    # Exploration. Ladder: https://arxiv.org/abs/1803.00933. Repeats: https://arxiv.org/abs/2006.01782.
    epsilon_schedule: Literal["linear", "exponential", "ladder"] = "linear"
    epsilon_start: float = Field(1.0, ge=0, le=1)
    epsilon_end: float = Field(0.05, ge=0, le=1)
    epsilon_decay_steps: int = Field(5_000, ge=1)
    epsilon_ladder_exponent: float = Field(7.0, ge=0)
    exploration_max_repeat: int = Field(1, ge=1, description="longest run of one exploratory action; 1 repeats none")

    # A good default.
    default_action: int | None = Field(None, ge=0, description="greedy from the start, before anything is learned")
    default_action_margin: Margin = Field(
        0.0, description="by how much another action's Q must exceed it; one number, or one for each action"
    )

    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> DQNConfig:
        if self.munchausen and self.head != "expected":
            raise ValueError(f"munchausen: expected head 'expected', got {self.head!r}")
        if self.sampling == "lap" and (self.head != "expected" or self.loss != "huber"):
            raise ValueError(
                f"sampling 'lap': expected loss 'huber' on an expected head, got {self.loss!r}, {self.head!r}"
            )
        if self.learning_starts > self.replay_capacity:
            raise ValueError(
                f"expected learning_starts <= replay_capacity={self.replay_capacity}, got {self.learning_starts}"
            )
        if self.epsilon_schedule == "exponential" and min(self.epsilon_start, self.epsilon_end) <= 0:
            raise ValueError(
                "epsilon_schedule 'exponential': expected epsilon_start and epsilon_end above 0,"
                f" got {self.epsilon_start} and {self.epsilon_end}"
            )
        if self.ignored_obs and not self.normalize_obs:
            raise ValueError(f"ignored_obs: expected normalize_obs, got {self.ignored_obs} without it")
        if self.noisy and self.epsilon_schedule == "ladder":
            raise ValueError("noisy: expected epsilon_schedule 'linear' or 'exponential', got 'ladder'")
        if self.gamma_end is not None and max(self.gamma, self.gamma_end) >= 1 and self.gamma != self.gamma_end:
            raise ValueError(f"gamma_end: expected both ends below 1, got {self.gamma} and {self.gamma_end}")
        margins, smallest = self.default_action_margin, (self.default_action or 0) + 1
        if self.branches:
            smallest = math.prod(self.branches)
        elif isinstance(margins, tuple):
            smallest = max(len(margins), smallest)
        self.network((1, 1, 1), smallest)
        return self

    @classmethod
    def preset(cls, name: PresetName, **changes: Any) -> DQNConfig:
        """A named configuration with some fields changed.

        "nature" is plain DQN as in Mnih et al. 2015 (https://www.nature.com/articles/nature14236), with a network for
        vectors: uniform replay of a million, one-step targets from a network copied every 10,000 updates, the TD error
        clipped to +-1 (the Huber gradient), rewards clipped to +-1, one update in four steps, and centred RMSProp with
        the constant of the paper scaled to gradients that are means over the batch, so that the steps are the paper's.
        "default" adds double and dueling, three-step returns, LayerNorm and an averaged target network.

        Args:
            name: "nature" or "default".
            changes: Fields that replace the preset's.

        Raises:
            ValueError: The name is not a preset, or a field is unknown or out of range.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset: expected one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def network(self, obs_shape: tuple[int, ...], num_actions: int) -> NetworkConfig:
        """The network that this agent builds for observations of `obs_shape` and `num_actions` actions."""
        fields = NetworkConfig.model_fields.keys() & type(self).model_fields.keys()
        values = {name: getattr(self, name) for name in fields}
        return NetworkConfig(obs_shape=obs_shape, num_actions=num_actions, **values)


FLAGS_READ: dict[str, frozenset[str]] = {
    "tabular": frozenset(
        {
            "gamma",
            "epsilon_schedule",
            "epsilon_start",
            "epsilon_end",
            "epsilon_decay_steps",
            "epsilon_ladder_exponent",
            "exploration_max_repeat",
        }
    ),
    "reinforce": frozenset(
        {"torso", "hidden_sizes", "layer_norm", "gamma", "learning_rate", "batch_size", "max_grad_norm"}
    ),
}
"""What the small agents read of a `DQNConfig`, beside the seed; they ignore everything else."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "nature": {
        "layer_norm": False,
        "dueling": False,
        "double": False,
        "n_step": 1,
        "target_update_period": 10_000,
        "target_ema": 1.0,
        "optimizer": "rmsprop",
        "learning_rate": 2.5e-4,
        "max_grad_norm": None,
        "reward_clip": 1.0,
        "replay_capacity": 1_000_000,
        "batch_size": 32,
        "learning_starts": 50_000,
        "replay_ratio": 0.25,
        "epsilon_start": 1.0,
        "epsilon_end": 0.1,
        "epsilon_decay_steps": 1_000_000,
    },
}
