"""Finding out whether the Hub answers, without asking it."""

import pytest
from huggingface_hub import constants, utils
from llmrl_envs.jobs.hub import hub_is_reachable


class Session:
    def __init__(self, error=None):
        self.error = error
        self.asked = []

    def head(self, url, timeout):
        self.asked.append((url, timeout))
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "reachable"), [(None, True), (OSError("no network"), False), (TimeoutError(), False)]
)
def test_one_short_question_decides(monkeypatch, error, reachable):
    session = Session(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", lambda: session)
    assert hub_is_reachable() is reachable
    assert session.asked == [(constants.ENDPOINT, 5.0)]


def test_offline_mode_asks_nothing(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(utils, "get_session", lambda: pytest.fail("asked"))
    assert hub_is_reachable() is False
