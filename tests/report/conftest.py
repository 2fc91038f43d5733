from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.report_browser import Browser, find_chromium
from tests.report.report_runs import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with control arms, failures and a holdout; tests only read it."""
    return make_run(tmp_path_factory.mktemp("report") / "smollm", count=60)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("needs a browser: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()
