"""Arrays as JSON values and back, bit for bit, so that an environment's state fits into a checkpoint."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, Any]]:
    """Each array as its dtype, its shape and its bytes in base64; NaN and infinity included."""
    return {
        name: {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii"),
        }
        for name, array in arrays.items()
    }


def unpack_arrays(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """What `pack_arrays` was given.

    Raises:
        ValueError: The bytes do not fill the shape, or the dtype is not a plain number's.
    """
    arrays = {}
    for name, value in packed.items():
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected numbers or truth values, got dtype {dtype}")
        data = base64.b64decode(value["data"], validate=True)
        arrays[name] = np.frombuffer(data, dtype).reshape(value["shape"]).copy()
    return arrays
