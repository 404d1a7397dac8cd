"""What structured pruning drops: the channels of an MLP, and the heads that share a key and a value."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import ConsumerStatistics
from modegpt_graph.match.site_module import Placed, SiteModule
from modegpt_graph.methods.common import Setting, Smaller, Unavailable
from modegpt_graph.rewrite.apply import linear_path, rewrite
from modegpt_graph.rewrite.solution import Solution
from modegpt_graph.trace.linear import Linear


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one site.

    heads: whether they are heads; else channels.   columns: (U, c) what each of U units puts into the matrix that reads
    them all.   cost: matrix parameters of one unit.   weight: (N, D) that matrix.
    norms: (U,) squared norm of the weights that give a unit's features and of those that read them.
    gram: (N + 1, N + 1) of [X, 1], what the matrix reads.
    """

    site: str
    layer: int
    heads: bool
    columns: Tensor
    cost: int
    weight: Tensor
    norms: Tensor
    gram: Tensor
    module: SiteModule = field(repr=False)
    placed: Placed = field(repr=False)

    @property
    def count(self) -> int:
        return len(self.columns)


def units_of(setting: Setting) -> tuple[Units, ...]:
    """The units of every MLP, and of every attention whose values go into one output matrix.

    Raises Unavailable where the model has none.
    """
    found = []
    for one in setting.modules:
        for placed in one.placed:
            statistics = setting.observed.statistics[placed.site.id]
            layout, heads = placed.footprint.layout, _has_heads(placed)
            channels = layout.groups == 1 and [kind.block_size for kind in layout.kinds] == [1]
            if isinstance(statistics, ConsumerStatistics) and (heads or channels):
                found.append(_units(setting, one, placed, statistics.gram, heads))
    if not found:
        raise Unavailable("no MLP and no attention was found whose channels or heads could be dropped")
    return tuple(found)


def _has_heads(placed: Placed) -> bool:
    return "mix" in placed.footprint.outline.match.operations


def _units(setting: Setting, one: SiteModule, placed: Placed, gram: Tensor, heads: bool) -> Units:
    layout, outline = placed.footprint.layout, placed.footprint.outline
    module = setting.dense.get_submodule(one.path)

    def by_unit(role: str) -> Tensor:
        members = layout.members[role]  # (G, g, d)
        return members.flatten(1) if heads else members[0].T

    (role, linear), *_ = outline.consumers.items()
    weight, columns = _matrix(module, linear).T.double(), by_unit(role)
    norms = weight.square().sum(1)[columns].sum(1)
    cost = columns.shape[1] * weight.shape[1]
    for producer, part in outline.producers.items():
        matrix, rows = _matrix(module, part), by_unit(producer)
        norms = norms + matrix.double().square().sum(1)[rows].sum(1)
        cost += rows.shape[1] * matrix.shape[1]
    if heads:
        cost += _score_parameters(setting, placed) // len(columns)
    assert placed.site.layer is not None
    return Units(placed.site.id, placed.site.layer, heads, columns, cost, weight, norms, gram, one, placed)


def _score_parameters(setting: Setting, placed: Placed) -> int:
    """Parameters of the query and key matrices that go with the values of a site; 0 where that is not certain.

    They are those of the attention scores in its layer, where the layer has one attention.
    """
    layer = [one for one in setting.surveyed.survey.located if one.site.layer == placed.site.layer]
    if sum("mix" in one.outline.match.operations for one in layer if one.outline.consumers) != 1:
        return 0
    count = 0
    for scores in (one for one in layer if not one.outline.consumers):
        for role, linear in scores.outline.producers.items():
            _, columns = linear.shape(tuple(setting.dense.get_parameter(linear.weight).shape))
            count += columns * sum(stop - start for start, stop in scores.site.roles[role].rows)
    return count


def _matrix(module: nn.Module, linear: Linear) -> Tensor:
    """(out, in)."""
    return linear.values(module)[0]


def without(
    setting: Setting, units: Sequence[Units], kept: Mapping[str, Tensor], *, compensate: bool = False
) -> Smaller:
    """The model in which each site has its `kept` units, ascending, and nothing is fitted again.

    Channels are cut out. A head's rows of the output matrix become zero, which is the same function: how many heads
    there are is fixed by a module's code.   compensate: what the dropped features are on average, times their weights,
    is added to the bias of the matrix that reads them.
    Raises Unavailable where a bias has no place.
    """
    smaller, removed, solutions = copy.deepcopy(setting.dense), 0, {}
    biases: list[tuple[Units, Tensor]] = []
    for one in units:
        stays = torch.zeros(one.count, dtype=torch.bool)
        stays[kept[one.site]] = True
        if stays.all():
            continue
        dropped = one.columns[~stays].flatten()
        removed += one.cost * int((~stays).sum())
        if one.heads:
            _silence(smaller, one, dropped)
        else:
            solutions[one.site] = Solution((kept[one.site][None],))
        if compensate:
            mean = one.gram[:-1, -1] / one.gram[-1, -1].clamp_min(1)
            biases.append((one, mean[dropped] @ one.weight[dropped]))
    rewrite(smaller, setting.modules, solutions)
    for one, bias in biases:
        _add_bias(smaller, one, bias)
    return Smaller(smaller, removed)


def _consumer(one: Units) -> Linear:
    return next(iter(one.placed.footprint.outline.consumers.values()))


def _silence(model: nn.Module, one: Units, columns: Tensor) -> None:
    linear = _consumer(one)
    parameter = model.get_submodule(one.module.path).get_parameter(linear.weight)
    weight = linear.matrix(parameter.data).clone()
    weight[:, columns] = 0
    parameter.data = linear.stored(weight, parameter.shape)


def _add_bias(model: nn.Module, one: Units, bias: Tensor) -> None:
    linear, module = _consumer(one), model.get_submodule(one.module.path)
    if linear.bias is not None:
        parameter = module.get_parameter(linear.bias)
        parameter.data = parameter.data + bias.to(parameter.dtype)
        return
    owner = module.get_submodule(linear_path(linear))
    if type(owner) is not nn.Linear:
        raise Unavailable(f"{one.site}: the matrix that reads the dropped features has no place for a bias")
    owner.bias = nn.Parameter(bias.to(owner.weight.dtype), requires_grad=False)
