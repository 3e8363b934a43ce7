"""Nested states of JSON values and NumPy arrays, as JSON values alone with the arrays beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MARK = "__array__"


def split_arrays(state: Any) -> tuple[Any, dict[str, NDArray[Any]]]:
    """The state with a mark in place of every array, and the arrays by the numbers in the marks.

    >>> split_arrays({"a": [1, np.zeros(2)]})
    ({'a': [1, {'__array__': '0'}]}, {'0': array([0., 0.])})
    """
    arrays: dict[str, NDArray[Any]] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[str(len(arrays))] = np.ascontiguousarray(value)
            return {_MARK: str(len(arrays) - 1)}
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list | tuple) else value

    return walk(state), arrays


def join_arrays(state: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Undoes `split_arrays`."""
    if isinstance(state, dict):
        if set(state) == {_MARK}:
            return arrays[state[_MARK]]
        return {key: join_arrays(item, arrays) for key, item in state.items()}
    return [join_arrays(item, arrays) for item in state] if isinstance(state, list) else state
