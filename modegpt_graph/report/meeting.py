"""What a pattern meets in a model, on the console: its sites, and where it came near and what was in the way."""

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from modegpt_graph.match.meeting import Meeting, NearMiss
from modegpt_graph.report import words
from modegpt_graph.report.fold import SiteGroup, fold_sites

MOST_MISSES = 8


def render_meeting(meeting: Meeting, model: str, console: Console) -> None:
    """The sites of equal layers together, then the near misses, the nearest first."""
    sites = words.plural(len(meeting.sites), "site") if meeting.sites else "nothing"
    console.print(Text.assemble("It meets ", (sites, "bold"), f" in {model}."), soft_wrap=True)
    for group in fold_sites(meeting.sites):
        console.print()
        _site(group, console)
    near = [one for one in meeting.misses if one.miss.beyond_first or one.miss.matched > 1]
    near = near or ([] if meeting.sites else list(meeting.misses))
    if near:
        console.print()
        console.print(Text("Where it came near, and what was in the way", "bold"))
        for one in near[:MOST_MISSES]:
            _miss(one, console)
    others = sum(len(one.places) for one in meeting.misses) - sum(len(one.places) for one in near[:MOST_MISSES])
    if others:
        console.print()
        told = "matched no more than the first step" if len(near) <= MOST_MISSES else "were farther from it"
        console.print(Text(f"{words.plural(others, 'other place')} {told}.", "dim"))
    elif not meeting.sites and not near:
        console.print("It came near nowhere: no operation of the model is one that its formula starts with.")


def _site(group: SiteGroup, console: Console) -> None:
    site = group.example
    verdict = Text(words.decision(site), "green") if site.decomposition else Text("refused", "red")
    layers = "outside the layers" if group.layers == "none" else f"layers {group.layers}"
    form = "" if site.variant == "plain" else f", {site.variant} form"
    console.print(Text.assemble(verdict, f"  {layers}{form}"))
    for role, matrix in site.roles.items():
        ends = [f"{first}-{end - 1}" for first, end in matrix.rows]
        rows = ", ".join(ends[:4]) + ", …" * (len(ends) > 4)
        line = Text.assemble((f"{role} ", "cyan"), matrix.parameter, (f"  rows {rows}", "dim"))
        console.print(Padding(line, (0, 0, 0, 2)), soft_wrap=True)
    reason = words.sentence(site.reason.removeprefix("refused: "))
    facts = f"{words.size_line(site)}; {words.certificate_line(site.certificate)}"
    console.print(Padding(Text.assemble(reason, "\n", (facts, "dim")), (0, 0, 0, 2)))


def _miss(one: NearMiss, console: Console) -> None:
    first = next(iter(one.places))
    more = f"  and {words.plural(len(one.places) - 1, 'other place')}, for the same reason" if one.places[1:] else ""
    console.print(Text.assemble((first, "bold"), (more, "dim")), soft_wrap=True)
    console.print(Padding(Text(words.sentence(str(one.miss))), (0, 0, 0, 2)))
