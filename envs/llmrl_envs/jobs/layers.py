"""Where a parameter stands in a model, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

# "embed_out" is the output layer of a GPT-NeoX.
_EMBEDDING = re.compile(r"embed(?!_out)|\bwte\b|\bwpe\b")
_LAYER_INDEX = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")


def lower_half(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters in the lower half of a model's layers, embeddings included; none of a single layer.

    >>> lower_half(["m.embed.weight", "m.layers.0.w", "m.layers.1.w", "head.weight"])
    ('m.layers.0.w', 'm.embed.weight')
    """
    layer = {name: int(match.group(1)) for name in names if (match := _LAYER_INDEX.search(name))}
    if not layer:
        return ()
    middle = (max(layer.values()) + 1) // 2
    if middle == 0:
        return ()
    lower = tuple(name for name in names if name in layer and layer[name] < middle)
    return lower + tuple(name for name in names if name not in layer and _EMBEDDING.search(name))
