"""How much the label of a classifier's example holds, which says what a level means for it."""

from __future__ import annotations

import math
import re
from typing import Any

from llmrl_envs.interface.job_scale import NOT_A_CLASSIFIER, label_nats
from torch import nn

_ONE_LABEL_AN_EXAMPLE = re.compile(r"For(Sequence|Image|Video|Audio)Classification$")


def model_label_nats(model: nn.Module) -> float:
    """Nats that the label of an example holds; infinity for a model with another head.

    Models that answer for tokens, spans or choices count as language models do: their examples hold more.

    Args:
        model: A model of transformers, wrapped or not.
    """
    for module in model.modules():
        if _ONE_LABEL_AN_EXAMPLE.search(type(module).__name__):
            config: Any = module.config
            if config.problem_type == "multi_label_classification":
                return float(config.num_labels * math.log(2))
            return label_nats(1 if config.problem_type == "regression" else config.num_labels)
    return NOT_A_CLASSIFIER
