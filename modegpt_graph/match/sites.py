"""What matching returns: sites, the matrices left alone, and how much of the decoder is covered."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

Commutant = Literal["linear", "columns", "blocks", "none"]
SiteType = Literal["I", "II", "III"]
Method = Literal["nystrom", "cr", "svd"]


@dataclass(frozen=True)
class Role:
    """One matrix of a site: a parameter, and the rows of its output-feature axis that belong to the role.

    Where the parameter holds a matrix for each expert, the rows of all of them are numbered through: row r of expert e
    is e · step + r.   step: rows of one matrix, 0 where the parameter is one.
    """

    parameter: str
    rows: tuple[tuple[int, int], ...]
    step: int = 0

    def of_copy(self, copy: int) -> "Role":
        """The same role of another expert."""
        return self if not copy else replace(self, rows=_moved(self.rows, copy * self.step))


@lru_cache(maxsize=4096)
def _moved(rows: tuple[tuple[int, int], ...], by: int) -> tuple[tuple[int, int], ...]:
    """Rows further down; equal layers share them."""
    return tuple((start + by, stop + by) for start, stop in rows)


@dataclass(frozen=True)
class Certificate:
    """Whether the commutation assumption of a site holds, and how that is known.

    method: `structural` (every operation is in the table), `probed` (run in float64 on random inputs), or `both`.
    max_error: largest deviation of the probe, relative to the largest output; None where no probe could be run.
    """

    method: Literal["structural", "probed", "both"]
    max_error: float | None
    holds: bool


@dataclass(frozen=True)
class Site:
    """A pair (or more) of weight matrices that can be made smaller together.

    id: unique, stable between runs.   layer: index of the decoder layer, None outside the repeated layers.
    variant: which of the pattern's alternative forms was met.   between: the operations between the matrices, in order.
    block_size: columns that must be kept or dropped together (1 for single columns), None where all are coupled.
    full_rank: number of features that a group (head) has; `groups`: number of such groups (1 for an MLP).
    copies: how many equal sites this stands for while it is solved, one for each expert of the tensors that hold them
    all; in an analysis each of them is a site of its own.
    decomposition: None where the site is refused; `reason` says why it was taken or refused.
    """

    id: str
    pattern: str
    variant: str
    type: SiteType
    paper_type: SiteType
    roles: Mapping[str, Role]
    between: tuple[str, ...]
    nonlinearities: int
    commutant: Commutant
    block_size: int | None
    certificate: Certificate
    decomposition: Method | None
    reason: str
    layer: int | None
    groups: int
    full_rank: int
    copies: int = 1

    @property
    def is_approximated(self) -> bool:
        """Whether it is decomposed although its features are all coupled: its certificate does not hold."""
        return self.decomposition is not None and self.commutant == "none"

    def apart(self) -> tuple["Site", ...]:
        """The sites that this stands for: itself, or one for each expert, by number."""
        if self.copies == 1:
            return (self,)
        path, _, pattern = self.id.rpartition(":")
        return tuple(
            replace(
                self,
                id=f"{path}.{copy}:{pattern}",
                roles={name: role.of_copy(copy) for name, role in self.roles.items()},
                copies=1,
            )
            for copy in range(self.copies)
        )


@dataclass(frozen=True)
class Unmatched:
    """A decoder-layer matrix that no pattern took, and how near the nearest one came."""

    parameter: str
    nearest_pattern: str | None
    reason: str


@dataclass(frozen=True)
class ModelFacts:
    """Name and sizes of the model that was analysed; parameters are counted once, tied ones too."""

    name: str
    architecture: str
    parameters: int
    decoder_linear_parameters: int


@dataclass(frozen=True)
class Analysis:
    """Every decoder-layer matrix, in a site or in `unmatched`.

    coverage: share of decoder-layer linear parameters that belong to a site, a refused one too.
    """

    model: ModelFacts
    sites: tuple[Site, ...]
    unmatched: tuple[Unmatched, ...]
    coverage: float
