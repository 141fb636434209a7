"""A report as one file of HTML that needs no network: markup from a template that escapes, charts drawn by Vega-Lite.

Nothing from a store can act: names are text in the markup (Jinja2 escapes them) or data in JSON whose `<` is written as
an escape; and a policy in the page lets no script run but the two whose digests it names, and nothing be fetched.
"""

import base64
import hashlib
import json
import math
from functools import cache
from importlib import resources
from typing import Any

from ckptstore._version import __version__
from ckptstore.errors import InvalidInputError
from ckptstore.report import charts
from ckptstore.report.facts import StoreFacts
from ckptstore.texts import bytes_text, time_text

__all__ = ["render", "require"]

MISSING = "reports need packages that are not installed: pip install 'ckptstore[report]'"


def require() -> None:
    """Raise InvalidInputError if what draws a report is not installed."""
    try:
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise InvalidInputError(MISSING) from error


def render(facts: StoreFacts, *, whole: bool, live: str | None = None) -> str:
    """The page.

    Args:
        facts: what to show.
        whole: whether it is of a whole store, and not of one run.
        live: what the server says of the store's state, for a page that looks whether anything was saved; None for a
            file.

    Raises:
        InvalidInputError: what draws it is not installed.
    """
    require()
    drawn = {f"store-{name}": chart for name, chart in charts.of_store(facts).items()} if whole else {}
    for number, run in enumerate(facts.runs, 1):
        drawn |= {f"run-{number}-{name}": chart for name, chart in charts.of_run(run).items()}
    style, script, bundle = _asset("page.css"), _asset("page.js"), _bundle()
    page: str = _template().render(
        facts=facts,
        whole=_whole(facts) if whole else None,
        charts=drawn,
        live=live,
        version=__version__,
        policy=_policy([script, bundle], live=live is not None),
        style=_trusted(style),
        script=_trusted(script),
        bundle=_trusted(bundle),
        data=_trusted(_json(drawn)),
    )
    return page


def _whole(facts: StoreFacts) -> dict[str, Any]:
    part = facts.stored_bytes / facts.logical_bytes if facts.logical_bytes else 1.0
    return {
        "checkpoints": sum(len(run.checkpoints) for run in facts.runs),
        "damaged": sum(run.damaged for run in facts.runs),
        "part": f"{part:.1%}" if part < 0.1 else f"{part:.0%}",
    }


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": bytes_text, "time": time_text}
    return environment.from_string(_asset("page.html"))


def _trusted(text: str) -> Any:
    """Ours, which is not to be escaped."""
    import markupsafe

    return markupsafe.Markup(text)


@cache
def _asset(name: str) -> str:
    return resources.files("ckptstore.report").joinpath(name).read_text("utf-8")


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed, which find their way into the page as one script."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.ckptstoreEmbed = vegaEmbed;")
    # It stands between tags: none of its texts may end it.
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(value: Any) -> str:
    """JSON that can stand within a script element: no `<`, and no number that JSON lacks."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _policy(scripts: list[str], *, live: bool) -> str:
    """What the page may do: run these scripts, have styles (which charts set), and nothing else."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )
