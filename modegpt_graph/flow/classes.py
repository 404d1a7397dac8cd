"""Coupling classes: which features depend on one another."""

import torch
from torch import Tensor


class Classes:
    """Disjoint sets over feature labels 0..count-1, built from pairs and read once they are all known."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pairs: list[Tensor] = []
        self._resolved: Tensor | None = None

    def join(self, first: Tensor, second: Tensor) -> None:
        """Put label `first[i]` and label `second[i]` into one class, for every i; negative labels are no features."""
        first, second = first.reshape(-1), second.reshape(-1)
        chosen = (first >= 0) & (second >= 0) & (first != second)
        if chosen.any():
            pairs = (first[chosen] * self.count + second[chosen]).unique()
            self._pairs.append(torch.stack([pairs // self.count, pairs % self.count]))
            self._resolved = None

    def resolved(self) -> Tensor:
        """(count,) the smallest label of each label's class."""
        if self._resolved is None:
            parent = torch.arange(self.count)
            if self._pairs:
                left, right = torch.cat(self._pairs, dim=1)
                while True:
                    lower = torch.minimum(parent[left], parent[right])
                    update = parent.clone()
                    for ends in (left, right, parent[left], parent[right]):
                        update.scatter_reduce_(0, ends, lower, "amin")
                    update = update[update]
                    if torch.equal(update, parent):
                        break
                    parent = update
            self._resolved = parent
        return self._resolved

    def of(self, labels: Tensor) -> Tensor:
        """Class of every label; negative labels stay as they are."""
        return torch.where(labels >= 0, self.resolved()[labels.clamp(min=0)], labels)
