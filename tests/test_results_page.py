"""The pages of results, speed and scaling say what the stored results say."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["results", "performance", "distributed"])
def test_the_page_is_the_one_that_the_stored_results_make(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from results_page import page

    assert (REPOSITORY / "docs" / f"{name}.md").read_text() == page(name)
