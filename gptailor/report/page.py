"""The report as one HTML file that opens offline and fetches nothing.

The data is JSON in a script element that browsers don't run; the page's own scripts build
everything from it with `textContent`. Text from users (models, tasks, folders, errors) is never
markup. A content security policy with the hashes of the page's own script and style makes sure
that nothing else runs and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gptailor.merging.registry import METHODS
from gptailor.report.export import front_dict, to_json
from gptailor.report.front_model import Report

_HERE = Path(__file__).parent
_SCRIPTS = ("dom.js", "chart.js", "layers.js", "detail.js", "table.js", "main.js")


def page_html(report: Report) -> str:
    """The whole page; the same report gives the same text."""
    import jinja2
    from markupsafe import Markup

    parts = [(_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    ).from_string((_HERE / "page.html").read_text(encoding="utf-8"))
    data = page_data(report)
    return template.render(
        title=data["title"],
        headline=_unbroken(data["headline"]["text"]),
        note=_unbroken(data["headline"]["note"]),
        style=Markup(style),
        script=Markup(script),
        data=Markup(json_for_script(data)),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def page_data(report: Report) -> dict[str, Any]:
    """The data for the page's scripts: `front.json`, and what only the page shows."""
    shown = {point.id for point in (*report.front, *report.controls)}
    return {
        **front_dict(report),
        "title": Path(report.run).resolve().name or report.run,
        "command": f"gptailor stitch {shlex.quote(report.run)}",
        "finished": _utc(report.finished_at),
        "flags": sorted({p.name for m in METHODS.values() for p in m.parameters if p.is_flag}),
        # shown as the weights of the two sources
        "shares": {name: m.share.name for name, m in METHODS.items() if m.share is not None},
        "config": dict(report.config),
        "others": [
            [p.id, p.number, p.layers, report.size_percent(p), p.search.accuracy]
            for p in report.points
            if p.id not in shown
        ],
        "hypervolume_history": [list(step) for step in report.hypervolume],
        "problems": [
            {
                "status": p.status,
                "reason": p.reason,
                "count": p.count,
                "number": p.number,
                "text": p.text,
            }
            for p in report.problems
        ],
    }


def _unbroken(text: str) -> str:
    """Uses narrow no-break spaces between a number, its error and its unit."""
    return text.replace(" ± ", "\u202f±\u202f").replace(" %", "\u202f%")


def json_for_script(value: object) -> str:
    r"""JSON for the inside of a script element: `<`, `>` and `&` as \u escapes.

    So neither `</script>` nor `<!--` can occur, whatever a model is called. U+2028 and U+2029 are
    escaped, too, and lone surrogates, which UTF-8 can't encode, become U+FFFD.
    """
    text = to_json(value)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _csp_hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def _utc(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
