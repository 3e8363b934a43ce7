"""A sum tree: draw indices in proportion to their priorities, and change priorities, in batches.

The tree is wide instead of binary: a node holds the sum of 16 children, and the top level (at most 4096 nodes) is
searched through its prefix sums. A million leaves need three levels where a binary tree needs twenty, which is what
makes a batch in numpy as fast as a loop in C++. Every node is recomputed from its children whenever one of them
changes, never incremented, so that no rounding error accumulates and the tree is a function of its leaves alone.

Schaul et al. 2016, https://arxiv.org/abs/1511.05952
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FAN_OUT = 16
PREFIX = np.triu(np.ones((FAN_OUT, FAN_OUT + 1)), 1)  # a product with it is `cumsum` behind a 0, four times as fast
MAX_TOP_NODES = 4096
MAX_STALE = 4096  # changes that may wait, so that a long time without a draw costs no memory


class SumTree:
    """Non-negative float64 priorities of `capacity` leaves, all 0 at first.

    Args:
        capacity: Number of leaves N, any positive number.

    Raises:
        ValueError: The capacity is not positive.

    >>> tree = SumTree(3)
    >>> tree.set([0, 2], [1.0, 3.0])
    >>> tree.total, tree.find([0.0, 0.99, 1.0, 3.99]).tolist()
    (4.0, [0, 0, 2, 2])
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity of a sum tree: expected a positive number, got {capacity}")
        self.capacity = capacity
        num_nodes = [capacity]
        while num_nodes[-1] > MAX_TOP_NODES:
            num_nodes.append(-(-num_nodes[-1] // FAN_OUT))
        padded = [-(-num // FAN_OUT) * FAN_OUT for num in num_nodes[:-1]] + num_nodes[-1:]
        self._levels = [np.zeros(num) for num in padded]  # leaves first
        self._families = [level.reshape(-1, FAN_OUT) for level in self._levels[:-1]]  # row p: the children of node p
        self._stale: list[NDArray[np.int64]] = []  # leaves whose ancestors are not recomputed yet
        self._prefix: NDArray[np.float64] | None = None  # 0 and the prefix sums of the top level

    @property
    def leaves(self) -> NDArray[np.float64]:  # [N], read-only
        """The priorities."""
        view = self._levels[0][: self.capacity]
        view.flags.writeable = False
        return view

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self._top_prefix()[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of all nodes."""
        return sum(level.nbytes for level in self._levels)

    def get(self, index: NDArray[np.int64]) -> NDArray[np.float64]:  # [B] -> [B]
        """Priorities of some leaves."""
        return self._levels[0].take(index)

    def set(
        self,
        index: ArrayLike,  # [B] int64; of an index that occurs twice the last priority counts
        priority: ArrayLike,  # [B] or a scalar, finite and >= 0
    ) -> None:
        """Changes the priorities of some leaves.

        Raises:
            ValueError: An index is outside [0, N), a priority is negative or not finite, or the shapes differ.
        """
        leaves = np.atleast_1d(np.asarray(index, dtype=np.int64))
        values = np.asarray(priority, dtype=np.float64)
        self._check(leaves, values)
        self._levels[0][leaves] = values
        self._recompute(leaves)

    def set_later(self, index: NDArray[np.int64], priority: NDArray[np.float64] | float) -> None:
        """Like `set` without checks; sums are recomputed when they are asked for, for many changes at once."""
        self._levels[0][index] = priority
        self._stale.append(index.copy())
        self._prefix = None
        if len(self._stale) >= MAX_STALE:
            self._refresh()

    def find(self, mass: ArrayLike) -> NDArray[np.int64]:  # [B] -> [B]
        """The leaves in which the prefix sum of the priorities first exceeds `mass`.

        A leaf of priority 0 is never returned: a mass that rounding carries past the end of a node falls into the
        node's last child of positive priority.

        Args:
            mass: [B] numbers in [0, total).

        Raises:
            ValueError: All priorities are 0, or a mass is outside [0, total).
        """
        total = self.total
        wanted = np.atleast_1d(np.asarray(mass, dtype=np.float64))
        if not total > 0:
            raise ValueError("drawing from a sum tree: expected a positive priority, got none")
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < total):
            raise ValueError(f"mass: expected numbers in [0, {total}), got {wanted.min()} to {wanted.max()}")
        return self._find(wanted)

    def sample(self, batch_size: int, rng: np.random.Generator) -> NDArray[np.int64]:  # [B]
        """Draws leaves in proportion to their priorities, one from each of `batch_size` equal parts of the total.

        Every draw lies uniformly in its part (stratified, as in Schaul et al. 2016), so that a leaf of probability p
        is expected batch_size * p times, with less variance than from independent draws.

        Raises:
            ValueError: All priorities are 0, or the batch size is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        total = self.total
        if not total > 0:
            raise ValueError("drawing from a sum tree: expected a positive priority, got none")
        mass = (np.arange(batch_size) + rng.random(batch_size)) * (total / batch_size)
        mass[-1] = min(mass[-1], np.nextafter(total, 0.0))  # the product may round up
        return self._find(mass)

    def _find(self, mass: NDArray[np.float64]) -> NDArray[np.int64]:
        """`find` without checks."""
        prefix = self._top_prefix()
        node = prefix.searchsorted(mass, side="right") - 1
        rest = mass - prefix.take(node)
        for family in reversed(self._families):
            node, rest = _descend(family, node, rest)
        priority = self._levels[0].take(node)
        if np.count_nonzero(priority) < len(priority):  # a product may round the same sum differently
            for k in np.flatnonzero(priority == 0):
                node[k] = self._find_one(float(mass[k]))
        return node

    def _find_one(self, mass: float) -> int:
        """`find` of one mass child by child, with sums that are exactly the same behind a leaf of priority 0."""
        node, rest = 0, mass
        for family in (self._levels[-1][None], *reversed(self._families)):
            children = family[node]
            prefix = children.cumsum()
            rest = min(rest, float(np.nextafter(prefix[-1], 0.0)))
            place = int(prefix.searchsorted(rest, side="right"))
            rest -= float(prefix[place - 1]) if place else 0.0
            node = node * len(children) + place
        return node

    def _check(self, index: NDArray[np.int64], priority: NDArray[np.float64]) -> None:
        if priority.ndim and priority.shape != index.shape:
            raise ValueError(f"priorities: expected shape {index.shape} like the indices, got {priority.shape}")
        if index.size and (index.min() < 0 or index.max() >= self.capacity):
            raise ValueError(f"index: expected 0 to {self.capacity - 1}, got {index.min()} to {index.max()}")
        if priority.size and not (priority.min() >= 0 and priority.max() < np.inf):
            raise ValueError(f"priorities: expected finite numbers >= 0, got {priority.min()} to {priority.max()}")

    def _recompute(self, index: NDArray[np.int64]) -> None:
        """Recomputes every ancestor of some leaves from its children."""
        self._prefix = None
        node = index
        for children, parents in zip(self._families, self._levels[1:], strict=True):
            node = node // FAN_OUT
            parents[node] = np.einsum("ij->i", children.take(node, axis=0))  # half the time of `sum`

    def _refresh(self) -> None:
        """Recomputes what `set_later` has left."""
        if self._stale:
            stale = np.concatenate(self._stale)
            self._stale.clear()
            self._recompute(stale)

    def _top_prefix(self) -> NDArray[np.float64]:
        self._refresh()
        if self._prefix is None:
            self._prefix = np.zeros(len(self._levels[-1]) + 1)
            np.cumsum(self._levels[-1], out=self._prefix[1:])
        return self._prefix


def _descend(
    family: NDArray[np.float64],  # [P, FAN_OUT] children of every node
    node: NDArray[np.int64],  # [B] nodes to descend from
    rest: NDArray[np.float64],  # [B] mass to find within the node
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The child in which each mass falls, and what is left of the mass within that child."""
    prefix = family.take(node, axis=0).dot(PREFIX)  # [B, 1 + FAN_OUT]
    end = prefix[:, -1]
    if np.count_nonzero(rest >= end):  # the sum of a node rounds differently from its place in its parent's prefix
        rest = np.minimum(rest, np.nextafter(end, 0.0))
    place = (prefix[:, 1:] > rest[:, None]).argmax(axis=1)
    before = prefix.ravel().take(np.arange(0, prefix.size, FAN_OUT + 1) + place)
    return node * FAN_OUT + place, rest - before
