"""The page in a real browser: it draws, reacts to mouse and keyboard, and contacts nobody."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptailor.evaluation.outcome import Cost, Outcome, Score
from gptailor.recipe import NO_LAYER, CalibrationDocuments, CalibrationTask, Merge, Repair, Take
from gptailor.report import Report, load_report, write_report
from gptailor.run.archive import Archive
from tests.report.report_browser import Browser
from tests.report.report_runs import (
    add,
    make_run,
    make_small,
    make_with_text,
    near_chance,
    recipe_of,
)
from tests.report.test_report_page import HOSTILE, runs_without_a_front

pytestmark = pytest.mark.system
SCORED = Outcome("ok", 0.5, (Score("piqa", "acc", 0.5, 0.02, 100),), "", Cost())


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report]:
    index = write_report(run, tmp_path_factory.mktemp("page"))
    return index.as_uri(), load_report(run)


def show(browser: Browser, url: str) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open("about:blank")
    browser.open(url)
    assert browser.evaluate("document.documentElement.dataset.ready") == "true"
    assert browser.problems == []
    asked = {request.partition("#")[0] for request in browser.requests}
    assert asked <= {url.partition("#")[0], "about:blank"}


def chosen(browser: Browser) -> str:
    """The chosen point; chart, panel and table must agree on it."""
    ids = {
        browser.evaluate("document.getElementById('detail').dataset.point"),
        browser.evaluate("document.querySelector('.mark.selected').dataset.point"),
        browser.evaluate("document.querySelector('.mark[aria-pressed=true]').dataset.point"),
        browser.evaluate("document.querySelector('#table tr[aria-selected=true]').dataset.point"),
    }
    assert len(ids) == 1
    return str(ids.pop())


def text(browser: Browser, selector: str) -> str:
    return str(browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def count(browser: Browser, selector: str) -> int:
    return int(browser.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))


def test_draws_everything(browser: Browser, page: tuple[str, Report]) -> None:
    url, report = page
    show(browser, url)
    shown = {p.id for p in (*report.front, *report.controls)}
    assert count(browser, ".mark") == count(browser, "#table tbody tr") == len(shown)
    assert count(browser, ".other") >= len(report.points) - len(shown)
    assert count(browser, ".matrix tbody tr") == len(report.front)
    ends = ({p.recipe.embeddings for p in report.front}, {p.recipe.head for p in report.front})
    columns = report.num_layers + sum(end != {report.base} for end in ends)
    assert count(browser, ".matrix tbody td") == len(report.front) * columns
    assert count(browser, "#volume-chart path") == 2
    assert count(browser, "details.problem") == len(report.problems)
    assert text(browser, "h1").startswith("At 75")
    assert chosen(browser) in shown


def test_a_link_chooses_a_point(browser: Browser, page: tuple[str, Report]) -> None:
    url, report = page
    for point in (report.front[0], report.controls[-1]):
        show(browser, f"{url}#point={point.id}")
        assert chosen(browser) == point.id
        assert text(browser, "#command").endswith(f"--point {point.id} stitched-{point.id}")
        gone = report.num_layers - len(set(point.recipe.src_layers))
        assert count(browser, ".map tr.gone") == gone
        assert count(browser, ".map tbody tr") == report.num_layers + 2
        head, *rows, embeddings = browser.evaluate(
            "[...document.querySelectorAll('.map tbody tr')].map((r) => "
            "[...r.children].map((c) => c.textContent))"
        )
        assert point.recipe.head in head[2] and point.recipe.embeddings in embeddings[2]
        assert [int(row[0]) for row in rows] == list(reversed(range(report.num_layers)))
        for src_layer, _, what, out_layer in rows:
            found = [i for i, src in enumerate(point.recipe.src_layers) if src == int(src_layer)]
            assert out_layer == (str(found[0]) if found else "–")
            assert what == "cut" if not found else point.recipe.layers[found[0]].models[0] in what
    show(browser, f"{url}#point=no-such-point")
    assert chosen(browser)


def test_merges_of_every_kind_are_shown(browser: Browser, tmp_path: Path) -> None:
    ties = Merge(
        "ties", 1, (("math", 0.5), ("code", 1.0)), (("density", (0.25, 0.75)), ("rescale", 1.0))
    )
    recipe = recipe_of([Take("math", 0, modules=(("mlp", Take("code", 0)),)), ties])
    end = Merge("karcher", NO_LAYER, (("math", 1.0), ("chat", 1.0)))
    with Archive(tmp_path) as archive:
        add(archive, replace(recipe, embeddings=end, head="chat", _cache={}), "search", SCORED)
    show(browser, write_report(tmp_path).as_uri())
    ends = "[...document.querySelectorAll('.matrix tbody td')].map((cell) => cell.title)"
    titles = [title.replace("\xa0", " ") for title in browser.evaluate(ends)]
    assert titles[0] == "embeddings: karcher: math + chat, max_iter 10, tol 0.00001"
    assert titles[-1] == "final norm and head: chat"
    rows = browser.evaluate(
        "[...document.querySelectorAll('.map .what')].map((cell) => cell.textContent)"
    )
    assert [row.replace("\xa0", " ") for row in rows if row != "cut"] == [
        "chat · final norm and head",
        "ties: math 0.5 + code 1, density math 0.25/code 0.75, λ 1, normalised, rescale",
        "math; mlp from code",
        "karcher: math + chat, max_iter 10, tol 0.00001 · embeddings",
    ]


def test_mouse_and_keyboard(browser: Browser, page: tuple[str, Report]) -> None:
    url, report = page
    front = [p.id for p in report.front]
    show(browser, f"{url}#point={front[1]}")
    browser.evaluate("document.querySelector('.mark[tabindex=\"0\"]').focus()")
    for key, expected in (
        ("ArrowRight", front[2]),
        ("ArrowLeft", front[1]),
        ("Home", front[0]),
        ("ArrowLeft", front[0]),
        ("End", front[-1]),
    ):
        browser.press(key)
        assert chosen(browser) == expected
    assert browser.evaluate("location.hash") == f"#point={front[-1]}"
    assert not browser.evaluate("document.getElementById('tooltip').hidden")
    browser.press("ArrowDown")
    assert chosen(browser) != front[-1]
    browser.click(f'.mark[data-point="{front[0]}"] .shape')
    assert chosen(browser) == front[0]
    browser.click(f'.matrix tr[data-point="{front[2]}"] button')
    assert chosen(browser) == front[2]
    browser.click(f'#table tr[data-point="{front[1]}"] button')
    assert chosen(browser) == front[1]
    browser.click(".command button")
    browser.evaluate("1")
    assert text(browser, ".command button") in ("Copied", "Selected", "Copy")
    assert browser.problems == []


def test_table_sorts_both_ways(browser: Browser, page: tuple[str, Report]) -> None:
    url, report = page
    show(browser, url)
    points = {p.id: p for p in (*report.front, *report.controls)}
    column = "#table thead th:nth-child(6)"
    for direction in ("descending", "ascending"):
        browser.click(f"{column} button")
        assert browser.evaluate(f"document.querySelector('{column}').ariaSort") == direction
        script = "[...document.querySelectorAll('#table tbody tr')].map((r) => r.dataset.point)"
        values = [points[i].search.accuracy for i in browser.evaluate(script)]
        assert values == sorted(values, reverse=direction == "descending")


def test_near_chance_no_percentage_is_shown(browser: Browser, tmp_path: Path) -> None:
    """Neither in the panel, the table and the tooltip, nor on the chart's axis."""
    index = write_report(make_small(tmp_path, near_chance(100, 5), chance=0.25))
    show(browser, index.as_uri())
    kept = browser.evaluate("[...document.querySelectorAll('.kept div')].map((x) => x.textContent)")
    assert [text.partition("accuracy")[0] for text in kept] == [
        "Above chance, search+15.0 points",
        "Above chance, holdout+13.8 points",
    ]
    heads = browser.evaluate(
        "[...document.querySelectorAll('#table thead th')].map((x) => x.textContent)"
    )
    assert heads[6] == "Above chance" and heads[8] == "Holdout above chance"
    cells = browser.evaluate(
        "[...document.querySelectorAll('#table tbody tr')].map((row) => "
        "[6, 8].map((i) => row.children[i].textContent))"
    )
    assert sorted(cells) == [
        ["+0.0", "−1.3"],
        ["+15.0", "+13.8"],
        ["−1.3", "+0.0"],
        ["−2.5", "−1.3"],
    ]
    said = browser.evaluate(
        "[...document.querySelectorAll('.mark')].map((x) => x.getAttribute('aria-label')).join()"
    )
    assert "points above chance" in said and "keeps" not in said
    axis = browser.evaluate(
        "[...document.querySelectorAll('#front-chart text')].map((x) => x.textContent)"
    )
    assert "kept" not in axis and not [text for text in axis if text.endswith("%")]
    last = "document.querySelectorAll('#detail tbody td:last-child')"
    kept = browser.evaluate(f"[...{last}].map((x) => x.textContent)")
    assert kept[-4:] == ["–"] * 4
    assert "; on the holdout code 0.250" in text(browser, "#facts")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_runs_over_the_edge(browser: Browser, page: tuple[str, Report], width: int) -> None:
    browser.resize(width, 900)
    show(browser, page[0])
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.resize(1280, 900)


def test_text_is_legible_in_both_themes(browser: Browser, page: tuple[str, Report]) -> None:
    """Contrast of ink, muted text and accents against the panels, by WCAG's formula."""
    script = """(() => {
      const style = getComputedStyle(document.documentElement);
      const luminance = (name) => {
        const hex = style.getPropertyValue(name).trim();
        const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
      };
      const ratio = (a, b) => Math.max(luminance(a) / luminance(b), luminance(b) / luminance(a));
      return ["--ink", "--muted", "--accent", "--control"].flatMap((name) =>
        ["--panel", "--bg"].map((back) => ratio(name, back)));
    })()"""
    for scheme in ("light", "dark"):
        browser.colour_scheme(scheme)
        show(browser, page[0])
        assert min(browser.evaluate(script)) >= 4.5


def test_hostile_names_do_nothing(browser: Browser, tmp_path: Path) -> None:
    index = write_report(make_run(tmp_path / "a b", count=10, names=HOSTILE))
    show(browser, index.as_uri())
    assert count(browser, "img") == 0
    assert browser.evaluate("document.documentElement.dataset.hacked") is None
    assert HOSTILE[0] in text(browser, "#model-legend")


def test_runs_without_a_front_are_drawn(browser: Browser, tmp_path: Path) -> None:
    for path in runs_without_a_front(tmp_path):
        show(browser, write_report(path).as_uri())
        assert count(browser, ".mark") == 0
        assert text(browser, "#detail-title") == "No point chosen"


def test_a_text_is_a_plain_number(browser: Browser, tmp_path: Path) -> None:
    found = {"dense:math": 1114.6, "dense:base": 31.68, "search": float("inf")}
    run = make_with_text(tmp_path, found)
    url = write_report(run).as_uri()
    cells = (
        "[...document.querySelectorAll('tr.uncounted')].map((r) => "
        "[...r.children].map((c) => c.textContent.trim()))"
    )
    for point, value in zip(load_report(run).points, ("1,115", "31.7", "not finite"), strict=True):
        show(browser, f"{url}#point={point.id}")
        assert browser.evaluate(cells) == [["language word_perplexity", value, "31.7", ""]]
    hover = browser.evaluate("document.querySelector('tr.uncounted th').title")
    expected = "word_perplexity,none, 7 documents, no part of the accuracy, held against the base"
    assert hover == expected


def test_a_repair_is_described(browser: Browser, tmp_path: Path) -> None:
    documents = CalibrationDocuments((CalibrationTask("piqa"),), documents=96, text="sample.txt")
    repair = Repair(documents, "after", (("piqa", "math"), ("text", "base")))
    kept = (0, 1, 3, 4, 5, 7)
    recipe = replace(recipe_of([Take("math", i) for i in kept]), repair=repair, _cache={})
    with Archive(tmp_path) as archive:
        add(archive, recipe, "search", SCORED)
    show(browser, write_report(tmp_path).as_uri())
    hints = "[...document.querySelectorAll('#detail-body .hint')].map((p) => p.textContent)"
    said = [line.replace("\xa0", " ") for line in browser.evaluate(hints)]
    assert (
        "Repaired: output layers 1–5, with 96 documents and 4,096 tokens of text at most. "
        "Teachers: math for piqa, base for text."
    ) in said
