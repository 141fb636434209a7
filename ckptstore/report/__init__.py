"""A store to look at: one page of HTML with its runs, what they cost and share, and how each went.

Layers, bottom up: `facts` (from manifests), `drifting` (what reads chunks), `charts` (Vega-Lite), `page` (HTML),
`serving` (the same page, live, for this machine alone). `ckptstore report` and `ckptstore ui` are what users call.
"""

from ckptstore import retention
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Progress
from ckptstore.report.facts import StoreFacts, gather
from ckptstore.report.page import render, require

__all__ = ["make", "render", "require"]


def make(
    objects: Objects,
    run: str | None,
    rules: retention.Rules,
    rules_text: str,
    *,
    drift: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> StoreFacts:
    """Gather what a report shows.

    Args:
        objects: the store's backend.
        run: tell of this run alone.
        rules: of the prune whose plan is shown.
        rules_text: the same in words.
        drift: read the chunks that changed, for how far each tensor moved.
        threads: that decode, with `drift`.
        progress: called with pairs of checkpoints compared so far, and those of the run in all.

    Raises:
        NotFoundError: there is no store, or no such run.
        UnavailableError: the backend failed.
    """
    require()
    facts = gather(objects, run, rules, rules_text)
    if drift:
        from ckptstore.report.drifting import drift as drift_of  # takes NumPy

        for each in facts.runs:
            each.heat = drift_of(objects, each, threads, progress) or each.heat
    return facts
