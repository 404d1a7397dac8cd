"""What approximated norms cost, and whether they paid, in sentences for the report."""

from collections.abc import Iterable

from modegpt_graph.report import words
from modegpt_graph.rewrite.solution import Solution


def approximation_said(
    solutions: Iterable[Solution], kl: float | None, kl_without: float | None, reachable: bool
) -> str:
    """A few sentences.

    solutions: of the sites whose norms were approximated and that were made smaller.   kl: KL(dense ‖ compressed) in
    nats per token, kl_without: of the same ratio taken from the other sites alone; None where it was not measured.
    reachable: whether the other sites alone can give the ratio.
    """
    done = list(solutions)
    if not done:
        return "No query/key under a norm was made smaller: at this ratio the other sites cost less."
    parts = [
        f"{words.plural(len(done), 'query/key site')} under a norm made smaller by an approximation, not proven; "
        f"attention logits are off by {_share(done, 'relative_error')} of their energy on calibration tokens, "
        f"and would be by {_share(done, 'exact_norm_error')} if the norm were exact."
    ]
    if not reachable:
        parts.append("The other sites alone cannot give this ratio.")
    elif kl is None or kl_without is None:
        parts.append("Whether it pays was not measured: nothing was held out for an evaluation.")
    else:
        figures = f"KL {words.figure(kl)} with it, {words.figure(kl_without)} with the same ratio from the other sites"
        verdict = "It pays here" if kl < kl_without else "It does not pay here; leave --approximate-norm out"
        parts.append(f"{verdict}: {figures}.")
    return " ".join(parts)


def _share(solutions: list[Solution], name: str) -> str:
    values = [getattr(one, name) or 0.0 for one in solutions]
    return words.percent(sum(values) / len(values))
