"""The page and the table as text: no name from a user can become markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptailor.evaluation.outcome import Cost, Outcome
from gptailor.recipe import Take
from gptailor.report import front_table, load_report, write_report
from gptailor.report.figures import front_png
from gptailor.report.page import json_for_script, page_data, page_html
from gptailor.run.archive import Archive
from tests.report.report_runs import CRASH, NAMES, add, make_run, recipe_of

HOSTILE = (
    "</script><img src=x onerror=document.documentElement.dataset.hacked=1>",
    "<!--<script>",
    "$\\frac{'\"&amp;`${1}",
    "é ☃ [31m",
)


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def data_of(html: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert match is not None
    return dict(json.loads(match[1]))


def test_page_is_one_file_that_fetches_nothing(run: Path) -> None:
    html = page_html(load_report(run))
    elements = Elements(html).found
    for tag, attributes in elements:
        assert tag not in ("link", "img", "iframe", "base", "form", "object")
        assert not {"src", "href", "style"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert set(re.findall(r"\w+://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    policy = next(a["content"] for t, a in elements if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_page_holds_the_data(run: Path) -> None:
    report = load_report(run)
    html = page_html(report)
    assert data_of(html) == json.loads(json.dumps(page_data(report)))
    assert str(data_of(html)["command"]).startswith("gptailor stitch ")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a <b> & 'c'", count=12, names=HOSTILE)
    with Archive(folder) as archive:
        failed = Outcome("failed", None, (), f"{HOSTILE[0]}\n{HOSTILE[0]}", Cost())
        add(archive, recipe_of([Take(HOSTILE[0], 3)], HOSTILE), "search", failed)
    report = load_report(folder)
    html = page_html(report)
    tags = [tag for tag, _ in Elements(html).found]
    clean = [tag for tag, _ in Elements(page_html(load_report(make_clean(tmp_path)))).found]
    assert tags == clean
    assert list(data_of(html)["models"]) == list(HOSTILE)
    assert front_table(report).isascii() and "\x1b" not in front_table(report)
    assert front_png(report, dpi=40).startswith(b"\x89PNG")


def make_clean(folder: Path) -> Path:
    return make_run(folder / "clean", count=3, names=NAMES)


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&lt;", "\u2028", "\ud800", '"\\'])
def test_json_in_a_script_element(text: str) -> None:
    embedded = json_for_script({text: [text, float("nan")]})
    assert not set("<>&\u2028\u2029") & set(embedded)
    embedded.encode()
    if text != "\ud800":
        assert json.loads(embedded) == {text: [text, None]}


def runs_without_a_front(folder: Path) -> list[Path]:
    """An empty run, one with failures only, one with early rungs only."""
    paths = [folder / name for name in ("empty", "failures", "rungs")]
    recipe = recipe_of([Take("math", 2)])
    for path in paths:
        with Archive(path) as archive:
            if path.name == "failures":
                add(archive, recipe, "search", Outcome("failed", None, (), CRASH, Cost()))
            if path.name == "rungs":
                add(archive, recipe, "search-100", Outcome("ok", 0.5, (), "", Cost(1.0)))
    return paths


def test_runs_without_a_front_have_a_report_too(tmp_path: Path) -> None:
    for path in runs_without_a_front(tmp_path):
        index = write_report(path)
        assert index == path / "report" / "index.html"
        assert data_of(index.read_text())["front"] == []
        assert (path / "front.csv").read_text().startswith("point,parameters,")
        assert (path / "front.png").is_file() and (path / "front.json").is_file()
        assert "worker hours" in front_table(load_report(path))


def test_terminal_table_fits_and_aligns(run: Path) -> None:
    report = load_report(run)
    lines = front_table(report).splitlines()
    assert all(len(line) <= 100 and line.isascii() for line in lines)
    rows = [line for line in lines if re.match(r"[0-9a-f]{8} ", line)]
    assert len(rows) == len(report.front) + len(report.controls)
    numbers = [re.search(r"0\.\d{3} ", row) for row in rows]
    assert len({number and number.start() for number in numbers}) == 1
    assert numbers[0] is not None
    assert "best stitched model keeps" in " ".join(lines)
