"""The pages of results, speed and scaling say what the stored results say."""

import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["results", "performance", "distributed"])
def test_the_page_is_the_one_that_the_stored_results_make(page: str) -> None:
    written = runpy.run_path(str(REPOSITORY / "benchmarks" / "results_page.py"))
    assert (REPOSITORY / "docs" / f"{page}.md").read_text() == written[page]()
