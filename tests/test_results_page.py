"""docs/results.md and docs/performance.md say what the stored results say."""

import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "writer"), [("results", "page"), ("performance", "performance")])
def test_the_page_is_the_one_that_the_stored_results_make(name: str, writer: str) -> None:
    written = runpy.run_path(str(REPOSITORY / "benchmarks" / "results_page.py"))
    assert (REPOSITORY / "docs" / f"{name}.md").read_text() == written[writer]()
