"""Equal layers told once: sites and unmatched matrices that differ only in their layer become one group."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from modegpt_graph.match.sites import Role, Site, Unmatched


@dataclass(frozen=True)
class SiteGroup:
    """Sites that are equal in everything but id, layer, expert, the indices in parameter names and the probe's error.

    example: the first, with `*` for the indices in its parameter names and the largest probe error of the group.
    """

    example: Site
    sites: tuple[Site, ...]

    @property
    def layers(self) -> str:
        """`0-31`, or `none` for a site outside the repeated layers."""
        return ranges(site.layer for site in self.sites if site.layer is not None) or "none"

    @property
    def per_layer(self) -> int | None:
        """How many of these sites each layer has (experts: more than one), None where it differs or is not known."""
        layers = {site.layer for site in self.sites}
        share, rest = divmod(len(self.sites), len(layers))
        return None if rest else share


@dataclass(frozen=True)
class UnmatchedGroup:
    """Matrices left alone for one reason. parameter: the name they share, with the range of their layers in it."""

    parameter: str
    example: Unmatched
    entries: tuple[Unmatched, ...]


def ranges(numbers: Iterable[int]) -> str:
    """0, 2, 4, 5, 6, 7 → "0, 2, 4-7". Duplicates count once."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def without_indices(name: str) -> str:
    """`model.layers.3.mlp.weight` → `model.layers.*.mlp.weight`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def fold_sites(sites: Sequence[Site]) -> tuple[SiteGroup, ...]:
    """Groups in the order in which their first site came."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault(_key(site), []).append(site)
    return tuple(SiteGroup(_example(members), tuple(members)) for members in groups.values())


def fold_unmatched(entries: Sequence[Unmatched]) -> tuple[UnmatchedGroup, ...]:
    """Groups in the order in which their first matrix came."""
    groups: dict[object, list[Unmatched]] = {}
    for entry in entries:
        reason = _unnamed(entry.reason, [entry.parameter])
        groups.setdefault((without_indices(entry.parameter), entry.nearest_pattern, reason), []).append(entry)
    return tuple(
        UnmatchedGroup(_ranged_name(members), replace(members[0], reason=reason), tuple(members))
        for (_, _, reason), members in groups.items()  # type: ignore[misc]
    )


def _example(members: list[Site]) -> Site:
    first = members[0]
    errors = [site.certificate.max_error for site in members]
    measured = [error for error in errors if error is not None]
    return replace(
        first,
        roles={
            role: replace(matrix, parameter=without_indices(matrix.parameter)) for role, matrix in first.roles.items()
        },
        reason=_site_reason(first),
        certificate=replace(first.certificate, max_error=max(measured, default=None)),
    )


def _key(site: Site) -> object:
    certificate = site.certificate
    return (
        site.pattern,
        site.variant,
        site.type,
        site.paper_type,
        tuple((role, without_indices(matrix.parameter), _rows(matrix, site)) for role, matrix in site.roles.items()),
        tuple(site.between),
        site.nonlinearities,
        site.commutant,
        site.block_size,
        (certificate.method, certificate.holds, certificate.max_error is None),
        site.decomposition,
        _site_reason(site),
        site.layer is None,
        site.groups,
        site.full_rank,
    )


def _rows(matrix: Role, site: Site) -> tuple[tuple[int, int], ...]:
    """Rows of a role, counted from the first that the site has of its parameter: experts of one tensor are alike."""
    first = min(start for role in site.roles.values() if role.parameter == matrix.parameter for start, _ in role.rows)
    return tuple((start - first, stop - first) for start, stop in matrix.rows)


def _site_reason(site: Site) -> str:
    return _unnamed(site.reason, [matrix.parameter for matrix in site.roles.values()])


def _unnamed(reason: str, parameters: list[str]) -> str:
    """The reason with the indices taken out of the names it mentions: a parameter's, or its module's."""
    for name in parameters:
        for known in (name, name.rpartition(".")[0]):
            if known:
                reason = re.sub(
                    rf"(?<![\w.]){re.escape(known)}(?!\w)", lambda _, known=known: without_indices(known), reason
                )
    return reason


def _ranged_name(members: list[Unmatched]) -> str:
    """The shared name, each index replaced by its only value or the range of its values."""
    columns = zip(*(entry.parameter.split(".") for entry in members), strict=True)
    return ".".join(
        parts[0] if len(set(parts)) == 1 else "{" + ranges(int(part) for part in parts) + "}" for parts in columns
    )
