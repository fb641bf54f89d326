"""The site of docs/: links hold, nothing is loaded from elsewhere, links out of docs/ lead somewhere."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from launched import python

REPOSITORY = Path(__file__).parents[1]


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value}
        self.ids.add(found.get("id", ""))
        self.links += [found[name] for name in ("href", "src", "srcset") if name in found]
        self.loaded += [found[name] for name in ("src", "srcset") if name in found]
        self.loaded += [found["href"]] if tag == "link" else []


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], dict[Path, Page]]:
    def build(repository: str) -> dict[Path, Page]:
        site = tmp_path_factory.mktemp("site")
        environment = {"REPOSITORY_URL": repository, "NO_MKDOCS_2_WARNING": "1"}
        build = ("-m", "mkdocs", "build", "--strict", "--site-dir", site)
        done = python(*build, cwd=REPOSITORY, env=environment)
        assert done.returncode == 0, done.stderr
        return {path: Page(path) for path in site.glob("*.html") if path.name != "404.html"}

    return build


def test_every_link_of_the_site_holds_and_nothing_is_loaded_from_elsewhere(built):
    pages = built("")
    assert len(pages) == len(list(REPOSITORY.glob("docs/*.md"))) + 4 - 1  # log.md stays in the repository
    for path, page in pages.items():
        assert not [link for link in page.loaded if "//" in link], path
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if "://" in target:
                continue
            file = (path.parent / target).resolve() if target else path
            assert file.exists(), f"{path.name}: {link}"
            assert not anchor or file not in pages or anchor in pages[file].ids, f"{path.name}: {link}"


def test_links_to_sources_lead_to_the_code_host_and_to_other_pages_into_the_site(built):
    named = {path.name: page.links for path, page in built("https://host/us/it").items()}
    assert "https://host/us/it/blob/HEAD/examples/mlp.py" in named["your_own_task.html"]
    assert "https://host/us/it/blob/HEAD/tests/fuzz.py" in named["security.html"]
    assert "slurm.html" in named["distributed.html"]
    assert "design.html" in named["contributing.html"]
    left = {link for links in named.values() for link in links if link.startswith("..") or ".md" in link}
    host = "https://host/us/it/blob/HEAD"
    assert left == {f"{host}/README.md", f"{host}/docs/log.md"}  # which are no pages of the site
