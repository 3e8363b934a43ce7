"""Pictures and text of a job so far."""

import math
import subprocess
import sys

import numpy as np
import pytest
from llmrl_envs.rendering import ScheduleHistory, close_window, draw_history, history_text, render_history


@pytest.fixture
def history():
    made = ScheduleHistory(("down", "hold", "up"), "a job", 20)
    rows = [(2, 3.0, 3.1, 1e-3, 1), (4, math.nan, 2.5, 4e-3, 2), (8, 2.0, math.nan, 2e-3, 0), (12, 1.8, 2.0, 0.0, 1)]
    for step, train, validation, rate, action in rows:
        made.append(step=step, train_loss=train, validation_loss=validation, learning_rate=rate, action=action)
    return made


def test_the_picture_shows_losses_rates_and_what_was_done(history):
    loss, rate, action = draw_history(history).axes
    assert loss.get_title() == "a job"
    train, validation = (line.get_ydata().tolist() for line in loss.get_lines())
    np.testing.assert_equal(train, history.train_losses)
    np.testing.assert_equal(validation, history.validation_losses)
    assert rate.get_yscale() == "log"
    np.testing.assert_equal(rate.get_lines()[0].get_ydata().tolist(), [1e-3, 4e-3, 2e-3, math.nan])
    assert action.collections[0].get_offsets().tolist() == [[4, 2], [8, 0]]  # holding is not drawn
    assert [label.get_text() for label in action.get_yticklabels()] == ["down", "hold", "up"]
    assert action.get_xlim() == (0, 20)


def test_a_validation_loss_that_was_never_measured_is_not_drawn(history):
    history.validation_losses = [math.nan] * 4
    assert [line.get_label() for line in draw_history(history).axes[0].get_lines()] == ["train"]


@pytest.mark.parametrize("empty", [False, True])
def test_pixels_are_bytes_of_a_fixed_size(history, empty):
    if empty:
        history = ScheduleHistory(("down", "hold", "up"), "a job", 20)
    pixels = render_history(history, "rgb_array")
    assert (pixels.shape, pixels.dtype) == ((600, 700, 3), np.uint8)
    assert pixels.min() < 50
    assert pixels.max() == 255


def test_pixels_change_with_the_job(history):
    before = render_history(history, "rgb_array")
    np.testing.assert_array_equal(before, render_history(history, "rgb_array"))
    history.append(step=16, train_loss=1.0, validation_loss=1.0, learning_rate=1e-3, action=2)
    assert not np.array_equal(before, render_history(history, "rgb_array"))


def test_the_text_tells_where_the_job_stands(history):
    heading, loss, rate = history_text(history).splitlines()
    assert heading == "a job: step 12/20, last action hold"
    # Where the validation loss is not known, the train loss stands in.
    assert loss == "loss          █▄▁▁  3.1 -> 2"
    assert rate == "learning rate ▃█▅▁  now 0"


def test_the_text_before_the_first_step():
    assert history_text(ScheduleHistory(("hold",), "a job", 20)) == "a job: step 0/20"


def test_the_text_of_a_job_without_a_finite_loss(history):
    history.train_losses = history.validation_losses = [math.nan] * 4
    history.actions[-1] = -1
    heading, loss, _ = history_text(history).splitlines()
    assert heading.endswith("last action none")
    assert "????" in loss


def test_a_window_is_drawn_again_and_closed(history):
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    assert render_history(history, "human") is None
    assert render_history(history, "human") is None
    assert pyplot.get_figlabels() == ["llmrl"]
    close_window()
    close_window()
    assert pyplot.get_figlabels() == []


def test_matplotlib_is_imported_for_pictures_alone():
    program = "import sys, llmrl_envs.rendering; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
