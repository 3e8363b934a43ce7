"""What a level means for a job of another kind than full fine-tuning of a small language model: a factor on its rates.

A level is a relative update of the weights that suits language models, whose examples hold hundreds of nats to learn
from. The label of a class holds log(classes), and less than a nat where there are two; what is left of the gradient is
noise, out of which Adam makes steps of the same size. So the level falls with the square root of what a label holds,
as it does with the square root of the batch where noise rules (Malladi et al. 2022, https://arxiv.org/abs/2205.10287).
What that is worth: docs/log.md, "Classifiers of few classes". A step that leans on its own gradient takes in more of
that noise, and falls with it once more.

A level was measured on models of up to a few million parameters, and no larger one bears it: beyond them it falls with
the square root of the number of parameters; see docs/log.md, "A level that larger models bear".
"""

from __future__ import annotations

import math

import numpy as np

from llmrl_envs.interface.statistics import Floats, Integers, TuningMode

LORA_LEVEL_SCALE = 2.8
"""Effective relative update of a LoRA job over that of full fine-tuning at the same level; see docs/log.md.

It was measured on the effective change of the weights, which is what a level refers to. A job that is asked to measure
the adapters' own norms instead (`level_norm="adapters"`, kept for comparison) gets the same factor, and wants more.
"""
FULL_LABEL_NATS = 4.0
"""Nats in a label from which a level means what it means for a language model: 55 classes."""
LEAST_LEANING_SCALE = 0.6
"""Of a classifier of few classes; see `leaning_scale`."""
LARGEST_LANGUAGE_MODEL, LARGEST_CLASSIFIER = 3.5e6, 15e6
"""Parameters of the largest models on which the default level was measured."""
NOT_A_CLASSIFIER = math.inf
"""Label nats of a job whose targets are tokens."""


def label_nats(num_classes: int) -> float:
    """Nats that the label of an example holds at most: the logarithm of the classes.

    Args:
        num_classes: One, as of a reward or a regression, counts as two.

    >>> round(label_nats(2), 3)
    0.693
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    return math.log(max(num_classes, 2))


def job_scale(mode: Integers, nats: Floats, num_parameters: Floats | float = 0.0) -> Floats:
    """Factor on the rates that a level means, float64[E].

    Args:
        mode: int64[E], a `TuningMode`: a level suits LoRA as it suits the rest.
        nats: float64[E], label nats; infinity for language models.
        num_parameters: float64[E], of the whole model; zero where it is not known.

    >>> job_scale(np.array([0, 0]), np.array([math.inf, math.inf]), np.array([3.5e6, 3.5e8]))
    array([1. , 0.1])
    """
    nats = np.asarray(nats, np.float64)
    tuned = np.where(np.asarray(mode) == TuningMode.LORA, LORA_LEVEL_SCALE, 1.0)
    largest = np.where(np.isfinite(nats), LARGEST_CLASSIFIER, LARGEST_LANGUAGE_MODEL)
    size = np.sqrt(largest / np.maximum(num_parameters, largest))
    return np.asarray(tuned * np.sqrt(np.minimum(nats / FULL_LABEL_NATS, 1.0)) * size)


def leaning_scale(nats: Floats) -> Floats:
    """Factor on the rates of steps that lean on their own gradient, float64[E]: one but for classifiers of few classes.

    Such a step is up to 1.7 times as long as Adam's where gradients are mostly noise. Language models bear that and
    gain by it; classifiers fly apart. See docs/log.md, "Classifiers that lean".

    Args:
        nats: float64[E], label nats; infinity for language models.

    >>> leaning_scale(np.log([2.0, 20.0, 77.0])).round(3)
    array([0.6  , 0.865, 1.   ])
    """
    return np.asarray(np.clip(np.sqrt(np.asarray(nats, np.float64) / FULL_LABEL_NATS), LEAST_LEANING_SCALE, 1.0))
