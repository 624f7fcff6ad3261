"""Files of the repository that the site shows where they are: docs/pages links to them as GitHub needs it."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = "docs/pages"
SHOWN = (
    "CHANGELOG.md",
    "benchmarks/*.md",
    "benchmarks/peaks.png",
    "examples/*.md",
    "examples/*.py",
    "examples/pictures/*",
    "examples/resnet/*.md",
    "examples/resnet/*.py",
    "examples/resnet/*.png",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead from one file of the repository to another; on the site docs/pages is the root."""
    uri = page.file.src_uri
    of_repository = uri if (ROOT / uri).exists() else posixpath.join(PAGES, uri)

    def on_the_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(of_repository), match[1]))
        target = target.removeprefix(PAGES + "/")
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)", on_the_site, markdown)
