"""Packages that some methods need and a plain installation does not bring."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmrl_envs.errors import UserError


def require_package(name: str, method: str) -> ModuleType:
    """Imports a package of the extra `baselines`.

    Args:
        name: The module.
        method: The method that needs it, for the error.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the method {method!r} needs a package that is not installed",
            expected=f"{name}: pip install 'llmrl[baselines]'",
            got=str(error),
            where="methods",
        ) from None
