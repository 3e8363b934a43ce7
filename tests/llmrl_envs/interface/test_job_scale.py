"""What a level means for LoRA, for classifiers of few classes and for larger models."""

import numpy as np
import pytest
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.job_scale import (
    FULL_LABEL_NATS,
    LARGEST_CLASSIFIER,
    LARGEST_LANGUAGE_MODEL,
    LEAST_LEANING_SCALE,
    LORA_LEVEL_SCALE,
    NOT_A_CLASSIFIER,
    job_scale,
    label_nats,
    leaning_scale,
)
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.interface.statistics import TuningMode


@pytest.mark.parametrize(("classes", "nats"), [(1, np.log(2)), (2, np.log(2)), (20, np.log(20)), (1000, np.log(1000))])
def test_a_label_holds_the_logarithm_of_the_classes(classes, nats):
    assert label_nats(classes) == pytest.approx(nats, rel=1e-15)


def test_a_leaning_step_of_a_classifier_falls_with_the_root_of_what_a_label_holds_and_not_below_its_least():
    nats = np.array([np.log(2), np.log(3), FULL_LABEL_NATS / 2, FULL_LABEL_NATS, 9.0, NOT_A_CLASSIFIER])
    expected = [LEAST_LEANING_SCALE, LEAST_LEANING_SCALE, np.sqrt(0.5), 1.0, 1.0, 1.0]
    np.testing.assert_allclose(leaning_scale(nats), expected, rtol=1e-15)


@pytest.mark.parametrize("classes", [0, -1])
def test_labels_of_no_class_are_refused(classes):
    with pytest.raises(ValueError, match=f"expected at least 1, got {classes}"):
        label_nats(classes)


def test_the_scale_falls_with_the_square_root_of_the_nats_and_is_the_higher_for_adapters():
    nats = np.array([NOT_A_CLASSIFIER, FULL_LABEL_NATS, FULL_LABEL_NATS / 4, 1e9, FULL_LABEL_NATS / 4])
    mode = np.array([TuningMode.FULL, TuningMode.FULL, TuningMode.FULL, TuningMode.LORA, TuningMode.LORA])
    expected = [1.0, 1.0, 0.5, LORA_LEVEL_SCALE, 0.5 * LORA_LEVEL_SCALE]
    np.testing.assert_allclose(job_scale(mode, nats), expected, rtol=1e-15)


def test_the_scale_falls_with_the_square_root_of_the_parameters_beyond_the_largest_model_that_was_measured():
    sizes = np.array([0.0, 1.0, 1.0, 100.0])
    mode, nats = np.array([0, 0, 1, 1]), np.full(4, NOT_A_CLASSIFIER)
    expected = np.array([1.0, 1.0, LORA_LEVEL_SCALE, 0.1 * LORA_LEVEL_SCALE])
    np.testing.assert_allclose(job_scale(mode, nats, sizes * LARGEST_LANGUAGE_MODEL), expected, rtol=1e-15)
    np.testing.assert_allclose(job_scale(mode, np.full(4, 99.0), sizes * LARGEST_CLASSIFIER), expected, rtol=1e-15)


@pytest.mark.parametrize("start", ["default", "given"])
def test_rates_of_a_classifier_are_scaled_and_a_given_rate_is_not(start):
    schedule = Schedule(
        action_table("moves"), np.array([100]), np.array([1e-3]), ScheduleSettings(start=start, warmup_fraction=0.0)
    )
    schedule.observe_job(np.array([TuningMode.FULL]), label_nats(2))
    schedule.observe_norms(np.array([2.0]), np.array([8.0]))
    held = np.sqrt(np.log(2) / FULL_LABEL_NATS) * 2.5e-3 * 4.0
    found = float(schedule.learning_rate(np.array([0]))[0])
    assert found == pytest.approx(1e-3 if start == "given" else held, rel=1e-12)
