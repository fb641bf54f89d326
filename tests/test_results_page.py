"""docs/results.md says what the stored results say."""

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_page_is_the_one_that_the_stored_results_make():
    written = runpy.run_path(str(REPOSITORY / "benchmarks" / "results_page.py"))
    assert (REPOSITORY / "docs" / "results.md").read_text() == written["page"]()
