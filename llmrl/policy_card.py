"""The card that travels with a policy: what it sees, does, was trained on, and where it has not been tried."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrl_envs.interface.action import ActionTable
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings

if TYPE_CHECKING:
    from llmrl.dqn.ensemble import EnsembleNetwork
    from llmrl.dqn.networks import QNetwork


def policy_card(
    table: ActionTable,
    spec: ObservationSpec,
    settings: ScheduleSettings,
    network: QNetwork | EnsembleNetwork | None,
    provenance: dict[str, Any],
    holds_on: Sequence[str] = (),
) -> str:
    """Markdown with a YAML header; written by the code, from facts alone."""
    training = dict(provenance)
    results = training.pop("results", None)
    lines = [
        "---",
        "library_name: llmrl",
        "tags: [learning-rate-schedule, fine-tuning, reinforcement-learning, dqn]",
        "---",
        "",
        f"# {provenance.get('name', 'hold')}: a learning-rate schedule policy",
        "",
        "Chooses the learning rate and update choices of a fine-tuning job from its training statistics.",
        "",
        f"- actions ({table.name}, {table.hash}): {', '.join(table.names)}",
        f"- levels ({table.unit.value}): {', '.join(f'{level:.3g}' for level in table.levels)}",
        f"- observation ({spec.hash}): {spec.size} entries, the last {spec.stack} decisions",
        f"- schedule: {settings.base} base, warm-up {settings.warmup_fraction:g} of the budget, "
        f"start at the {settings.start} level, {settings.rollbacks} rollbacks",
        f"- network: {'none, it holds the default level' if network is None else _describe(network)}",
        "",
        "## Use",
        "",
        "    llmrl finetune --config FILE --policy FOLDER --output DIR",
        "",
    ]
    if training:
        lines += ["## Training", "", "```json", json.dumps(training, indent=2, sort_keys=True), "```", ""]
    if results:
        lines += ["## Results", "", "```json", json.dumps(results, indent=2, sort_keys=True), "```", ""]
    lines += [
        "## Limits",
        "",
        "It knows the tasks listed under training. On other models, data, budgets or optimizers compare it with `hold`",
        "and with a linear decay before trusting it (`llmrl compare`).",
        *(
            f"It was found to do harm on {kind.removesuffix('_but_lean').replace('_', ' ')} and holds there"
            f"{', but for leaning on gradients' if kind.endswith('_but_lean') else ''}."
            for kind in holds_on
        ),
        "",
    ]
    return "\n".join(lines)


def _describe(network: QNetwork | EnsembleNetwork) -> str:
    from llmrl.dqn.ensemble_config import EnsembleConfig

    config = network.config
    count = sum(parameter.numel() for parameter in network.parameters())
    told = f"{config.torso} {list(config.hidden_sizes)}, {config.head} head, {count:,} parameters"
    if not isinstance(config, EnsembleConfig):
        return told
    below = f", {config.lower_bound:g} standard deviations below their mean" if config.lower_bound else ", their mean"
    return f"{config.num_members} of {told} in all{below}"
