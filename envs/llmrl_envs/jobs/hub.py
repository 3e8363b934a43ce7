"""Whether the Hugging Face Hub can be asked, found out at once."""

from __future__ import annotations

PROBE_SECONDS = 5.0


def hub_is_reachable() -> bool:
    """Asks the Hub for a sign of life.

    The libraries retry for most of a minute before they give up, and then for every file again; a job that names a
    cached model or a misspelt path should not wait for that. False too where `HF_HUB_OFFLINE` is set.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:
        # Requests or httpx, by version; whatever the reason, the Hub does not answer.
        return False
    return True
