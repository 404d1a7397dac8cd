"""Put decompositions into a model: smaller matrices, and forward methods that fit them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from modegpt_graph.codegen.emit import Forward, emit
from modegpt_graph.codegen.install import install
from modegpt_graph.codegen.join import joined, names_in, prefix_of
from modegpt_graph.flow.layout import Layout
from modegpt_graph.flow.shrink import Edits, Selection, shrink
from modegpt_graph.match.probe import selection_of
from modegpt_graph.match.site_module import Placed, SiteModule, labels_of
from modegpt_graph.rewrite.kept import resize_kept
from modegpt_graph.rewrite.solution import Solution, slots, taken
from modegpt_graph.trace.linear import Linear
from modegpt_graph.trace.operations import operation

EAGER = "eager"  # the library's name for attention that is written out


@dataclass(frozen=True)
class Resized:
    """A matrix after the rewrite: (output features, input features), whether it has a bias and is an `nn.Linear`."""

    out_features: int
    in_features: int
    bias: bool
    is_linear: bool


@dataclass(frozen=True)
class RewrittenModule:
    """What changed in one module.

    class_name: of its new class, None where its own forward method fits the smaller matrices.
    resized: path of the matrix's module within this one → its new shape.
    attends: whether its new forward method computes attention itself, instead of by the library's interface: it was
    traced as eager code, and needs the mask that the model makes for that.
    kept: path within this one → new shape, for tensors that keep features from call to call.
    """

    path: str
    class_name: str | None
    forward: Forward | None
    resized: Mapping[str, Resized]
    attends: bool = False
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class _Matrix:
    """A weight (out, in) and bias on their way to what they become."""

    linear: Linear
    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    columns: Tensor
    first_bias: Tensor | None  # as it was: sites that are fitted again side by side each change it

    @classmethod
    def of(cls, linear: Linear, module: nn.Module, copy: int) -> "_Matrix":
        """The matrix of a product as it is; `copy`: which expert's, where the parameter holds several."""
        weight, bias = linear.values(module, None if linear.experts is None else copy)
        rows, columns = (torch.arange(size) for size in weight.shape)
        return cls(linear, weight.clone(), None if bias is None else bias.clone(), rows, columns, bias)

    def finished(self) -> tuple[Tensor, Tensor | None]:
        weight = self.weight[self.rows][:, self.columns]
        return weight, None if self.bias is None else self.bias[self.rows]


def rewrite(
    model: nn.Module, modules: tuple[SiteModule, ...], solutions: Mapping[str, Solution]
) -> tuple[RewrittenModule, ...]:
    """Rewrite every site that has a solution, in place. solutions: site id → its solution.

    Raises ModegptError where a module cannot be rewritten.
    """
    names: dict[tuple[type, str], str] = {}
    outcome = []
    for one in modules:
        chosen = {placed.site.id: solutions[placed.site.id] for placed in one.placed if placed.site.id in solutions}
        if chosen:
            outcome.append(_rewrite_module(model, one, chosen, names))
    config = getattr(model, "config", None)
    if config is not None and any(one.attends for one in outcome):
        config._attn_implementation = EAGER
    return tuple(outcome)


def _rewrite_module(
    model: nn.Module, one: SiteModule, solutions: Mapping[str, Solution], names: dict[tuple[type, str], str]
) -> RewrittenModule:
    module = model.get_submodule(one.path)
    placed = [p for p in one.placed if p.site.id in solutions]
    selection = _merged(one, placed, solutions)
    edits = shrink(one.region, one.flow, selection)
    ways = [_edited(fork, solutions) for _, fork in one.forks]
    for p in placed:
        if p.site.is_approximated:
            edits.factors |= _query_factor(one, p, edits, solutions[p.site.id])
    matrices = _matrices(module, one, placed, solutions, selection, edits)
    converts = not edits.empty or any(not way.empty for way in ways)
    kept = resize_kept(module, one, placed, solutions, edits)
    resized = dict(_replace(module, copies, converts) for copies in matrices.values())
    if not converts:
        return RewrittenModule(one.path, None, None, resized)
    linear_modules = [path for path, shape in resized.items() if shape.is_linear]
    others = [
        (condition, emit(fork.trace, way, linear_modules, prefix=prefix_of(number), known=names_in(condition)))
        for number, ((condition, fork), way) in enumerate(zip(one.forks, ways, strict=True), 1)
    ]
    forward = joined(emit(one.trace, edits, linear_modules), others)
    name = names.setdefault(
        (type(module), forward.source), f"Compressed{type(module).__name__}{_number(names, module)}"
    )
    install(module, forward, name)
    mixes = (one.graph.traced(key) for key in one.graph.nodes if one.graph.operation(key) == "mix")
    attends = any(operation(node) != "attention" for node in mixes)
    return RewrittenModule(one.path, name, forward, resized, attends, kept)


def _edited(fork: SiteModule, solutions: Mapping[str, Solution]) -> Edits:
    placed = [p for p in fork.placed if p.site.id in solutions]
    return shrink(fork.region, fork.flow, _merged(fork, placed, solutions))


def _query_factor(one: SiteModule, placed: Placed, edits: Edits, solution: Solution) -> dict[fx.Node, Tensor]:
    """The node of the queries → (1, H, 1, k) what their features are multiplied by; ones where a file tells later."""
    query = placed.footprint.outline.operands[0]
    labels = edits.labels[query]  # of the kept features
    assert isinstance(labels, Tensor)
    first = labels.narrow(0, 0, 1).narrow(-2, 0, 1)
    if solution.query_factor is None:
        return {query: torch.ones(first.shape)}
    members = labels_of(one, placed)[next(iter(placed.footprint.outline.producers))]  # (G, g, d)
    sources = taken(placed.footprint.layout, solution.kept)[:, None].expand(-1, members.shape[1], -1)  # (G, g, k)
    factors = torch.ones(int(first.max()) + 1)
    factors[members.gather(2, sources).flatten()] = solution.query_factor.flatten().float()
    return {query: factors[first]}


def _number(names: Mapping[tuple[type, str], str], module: nn.Module) -> str:
    base = f"Compressed{type(module).__name__}"
    others = sum(name.rstrip("0123456789") == base for name in names.values())
    return str(others + 1) if others else ""


def linear_path(linear: Linear) -> str:
    """The module, within the traced one, that holds a matrix."""
    return linear.weight.rpartition(".")[0]


def _merged(one: SiteModule, placed: list[Placed], solutions: Mapping[str, Solution]) -> Selection:
    count = one.flow.classes.count
    parts = []
    for p in placed:
        # Experts of one tensor keep equally many features in the same places: one of them speaks for all.
        solution = solutions[p.site.id]
        solution = solution if p.footprint.outline.experts is None else solution.of_copy(0)
        parts.append(selection_of(p.footprint.one, solution.kept, labels_of(one, p), count))
    return Selection.merged(parts, count)


def _matrices(
    module: nn.Module,
    one: SiteModule,
    placed: list[Placed],
    solutions: Mapping[str, Solution],
    selection: Selection,
    edits: Edits,
) -> dict[str, list[_Matrix]]:
    """Weight name → what its matrix becomes, or the matrices of all experts in it."""
    matrices: dict[str, list[_Matrix]] = {}

    def matrix(linear: Linear, copy: int) -> _Matrix:
        if linear.weight not in matrices:
            matrices[linear.weight] = [_Matrix.of(linear, module, number) for number in range(linear.copies)]
        return matrices[linear.weight][copy]

    for p in placed:
        layout, outline = p.footprint.one, p.footprint.outline
        for copy in range(outline.copies):
            solution = solutions[p.site.id]
            solution = solution if outline.experts is None else solution.of_copy(copy)
            places, sources = slots(layout, [kept.shape[1] for kept in solution.kept]), taken(layout, solution.kept)
            for role, linear in outline.producers.items():
                own = matrix(linear, copy)
                _select_rows(own, layout.members[role], places, sources, solution.maps.get(role))
                if role in solution.rows:
                    targets = _targets(layout.members[role], places)
                    own.weight[targets] = solution.rows[role].to(own.weight.dtype)
            for role, linear in outline.consumers.items():
                _select_columns(matrix(linear, copy), layout.members[role], places, sources, solution.refits.get(role))
    for weight in one.producers:
        for own in matrices.get(weight, ()):
            first = one.offsets[weight]
            own.rows = selection.keep[first : first + own.weight.shape[0]].nonzero().flatten()
    return matrices


def _select_rows(matrix: _Matrix, members: Tensor, places: Tensor, sources: Tensor, mapped: Tensor | None) -> None:
    """Put new rows into the places that stay. members: (G, g, d).   places, sources: (G, k).   mapped: (G, g, d, k)."""
    if matrix.weight.is_meta:
        return
    heads = members.shape[1]
    targets = _targets(members, places)
    if mapped is None:
        chosen = members.gather(2, sources[:, None].expand(-1, heads, -1))
        weight, bias = matrix.weight[chosen], None if matrix.bias is None else matrix.bias[chosen]
    else:
        weight = torch.einsum("ghdk,ghdi->ghki", mapped, matrix.weight[members].double())
        bias = None if matrix.bias is None else torch.einsum("ghdk,ghd->ghk", mapped, matrix.bias[members].double())
    matrix.weight[targets] = weight.to(matrix.weight.dtype)
    if matrix.bias is not None and bias is not None:
        matrix.bias[targets] = bias.to(matrix.bias.dtype)


def _select_columns(
    matrix: _Matrix, members: Tensor, places: Tensor, sources: Tensor, refit: tuple[Tensor, Tensor | None] | None
) -> None:
    """Put new columns into the places that stay, and drop the others."""
    heads = members.shape[1]
    targets = _targets(members, places)
    if not matrix.weight.is_meta:
        if refit is None:
            chosen = members.gather(2, sources[:, None].expand(-1, heads, -1))
            matrix.weight[:, targets.flatten()] = matrix.weight[:, chosen.flatten()]
        else:
            weight, bias = refit
            matrix.weight[:, targets.flatten()] = weight.flatten(0, 2).T.to(matrix.weight.dtype)
            if bias is not None and matrix.bias is not None and matrix.first_bias is not None:
                changed = matrix.bias.double() - matrix.first_bias.double()
                matrix.bias = (bias + changed).to(matrix.bias.dtype)
    stays = _columns_that_stay(members, targets, matrix.weight.shape[1])
    matrix.columns = matrix.columns[stays[matrix.columns]]


def refit_in(linear: nn.Linear, members: Tensor, layout: Layout, solution: Solution) -> tuple[Tensor, Tensor | None]:
    """The (G, g, k, D) rows and the (D,) bias that a rewritten consumer has for a site's features, in float64.

    members: (G, g, d) input columns that they had before the rewrite.
    """
    rows = linear.weight.detach().double().T[columns_in(linear, members, layout, solution)]
    return rows, None if linear.bias is None else linear.bias.detach().double()


def columns_in(linear: nn.Linear, members: Tensor, layout: Layout, solution: Solution) -> Tensor:
    """(G, g, k) input columns that a rewritten consumer has for a site's features.

    members: (G, g, d) those that they had before the rewrite.
    """
    targets = _targets(members, slots(layout, [kept.shape[1] for kept in solution.kept]))
    stays = _columns_that_stay(members, targets, linear.in_features + members.numel() - targets.numel())
    return stays.cumsum(0)[targets] - 1


def rows_in(linear: nn.Linear, members: Mapping[str, Tensor], layout: Layout, solution: Solution) -> dict[str, Tensor]:
    """Role → the (G, g, k, D) rows that a rewritten producer has for a site's features, in float64.

    members: role → (G, g, d) output rows that it had there before the rewrite.
    """
    places = slots(layout, [kept.shape[1] for kept in solution.kept])
    targets = {role: _targets(own, places) for role, own in members.items()}
    dropped = sum(own.numel() - targets[role].numel() for role, own in members.items())
    stays = torch.ones(linear.out_features + dropped, dtype=torch.bool)
    for role, own in members.items():
        stays &= _columns_that_stay(own, targets[role], len(stays))
    rows = linear.weight.detach().double()
    return {role: rows[stays.cumsum(0)[own] - 1] for role, own in targets.items()}


def _targets(members: Tensor, places: Tensor) -> Tensor:
    """(G, g, k) rows or columns that stay. members: (G, g, d).   places: (G, k)."""
    return members.gather(2, places[:, None].expand(-1, members.shape[1], -1))


def _columns_that_stay(members: Tensor, targets: Tensor, count: int) -> Tensor:
    """(count,) which columns of a consumer stay: a site's targets, and all that are not the site's."""
    stays = torch.ones(count, dtype=torch.bool)
    stays[members.flatten()] = False
    stays[targets.flatten()] = True
    return stays


def _replace(module: nn.Module, copies: Sequence[_Matrix], converts: bool) -> tuple[str, Resized]:
    """Put finished matrices back under their old name, as an `nn.Linear` where the module is nothing but that."""
    linear = copies[0].linear
    weight, bias = copies[0].finished() if linear.experts is None else _stacked(copies)
    path = linear_path(linear)
    owner = module.get_submodule(path)
    plain = {name for name, _ in owner.named_parameters(recurse=False)} <= {"weight", "bias"}
    is_matrix = weight.ndim == 2 and linear.spread is None
    is_linear = type(owner) is nn.Linear or (converts and plain and bool(path) and is_matrix)
    shape = Resized(weight.shape[-2], weight.shape[-1], bias is not None, is_linear)
    if is_linear:
        new = nn.Linear(shape.in_features, shape.out_features, shape.bias, device="meta")  # no random weights are drawn
        new.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            new.bias = nn.Parameter(bias, requires_grad=False)
        new.train(owner.training)
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, new)
    else:
        shape_before = module.get_parameter(linear.weight).shape
        stored = linear.stored(weight, shape_before, copies[0].rows, copies[0].columns)
        setattr(owner, linear.weight.rpartition(".")[2], nn.Parameter(stored, requires_grad=False))
        if bias is not None and linear.bias is not None:
            bias = linear.stored_bias(bias, module.get_parameter(linear.bias).shape, copies[0].rows)
            setattr(owner, linear.bias.rpartition(".")[2], nn.Parameter(bias, requires_grad=False))
    return path, shape


def _stacked(copies: Sequence[_Matrix]) -> tuple[Tensor, Tensor | None]:
    weights, biases = zip(*(one.finished() for one in copies), strict=True)
    return torch.stack(weights), None if biases[0] is None else torch.stack(biases)
