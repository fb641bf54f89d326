"""What `make docs` does to links that leave docs/: they lead to pages of the site, or to the code host."""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "slurm/README.md": "slurm.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
NO_PAGE = {"docs/log.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages of the repository outside docs/ become pages of the site."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on a code host become the site's."""
    source = REPOSITORY / SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        path = os.path.relpath((source.parent / target).resolve(), REPOSITORY)
        if path in PAGES or (path.startswith("docs/") and path not in NO_PAGE):
            return f"[{text}]({PAGES.get(path, path.removeprefix('docs/'))}{anchor})"
        return (
            f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path}{anchor})" if config.repo_url else text
        )

    return re.sub(r"\[([^\]]*)\]\(([^):#\s]+)((?:#[^)\s]*)?)\)", link, markdown)
