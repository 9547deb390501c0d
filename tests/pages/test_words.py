"""A page says what its source says: no word of a proof moved, eaten or set apart on the way from the checkout to the browser.

The other reading of the same text is mistune's, which follows CommonMark, as code-hosting pages and JupyterLab do; the site is
Python-Markdown's, which takes two underscores for an emphasis, a brace at a paragraph's end for attributes, and a list without an
empty line before it for a sentence.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import mistune
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"br", "img", "hr", "input", "meta", "link", "source", "wbr", "path", "circle"}
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


class Words(HTMLParser):
    """The text of a page, or of its `within`; formulas, buttons and drawings left out."""

    def __init__(self, html: str, within: str = "") -> None:
        super().__init__()
        self.within, self.inside, self.hidden, self.found = within, not within, 0, ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside |= tag == self.within
        names = (dict(attributes).get("class") or "").split()
        if tag not in ALONE and (
            self.hidden or tag in ("script", "style", "svg", "math", "button", "label") or "headerlink" in names
        ):
            self.hidden += 1

    def handle_endtag(self, tag: str) -> None:
        self.inside &= not self.within or tag != self.within
        self.hidden -= bool(self.hidden and tag not in ALONE)

    def handle_data(self, data: str) -> None:
        if self.inside and not self.hidden:
            self.found += data


def bare(text: str) -> str:
    """`text` without what a reading may change: spaces, and the marks of indices and emphasis."""
    return re.sub(r"[\s_{}^*|]", "", text).replace("−", "-")


def said(markdown: str) -> str:
    """What a page says, by the other reading."""
    text = re.sub(r"^---\n.*?\n---\n|<!--.*?-->|\$\$.*?\$\$|\$[^$\n]+\$", "", markdown, flags=re.DOTALL)
    text = re.sub(r'^\?\?\?\+? \w+ "(.*?)"', r"\1", text, flags=re.MULTILINE)  # what a fold is called
    text = re.sub(r'^( *)(`{3,}\w*) *title="(.*?)"', r"\1\3\n\n\1\2", text, flags=re.MULTILINE)
    return bare(Words(str(mistune.create_markdown(escape=False, plugins=["table"])(text))).found)


def shown(site: Path, page: str) -> str:
    return bare(Words((site / page).read_text(), "article").found)


@pytest.mark.parametrize("path", PAGES, ids=[path.stem for path in PAGES])
def test_a_page_says_what_its_source_says(site, path):
    assert shown(site, f"{path.stem}.html") == said(path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebooks_page_says_what_its_cells_say(site, path):
    page = shown(site, f"notebooks/{path.stem}.html")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert [cell[:80] for cell in cells if said(cell) not in page] == []
    assert len(cells) > 10


def test_the_other_reading_sees_what_python_markdown_does_to_a_proof():
    import markdown

    proof = "where B has δ̃_{l-1} = r_{l-1} in place of δ_{l-1}. Their weight is (γλ)^{n-1}"
    html = markdown.markdown(proof, extensions=["attr_list"])
    assert bare(Words(html).found) != said(proof) == "whereBhasδ̃l-1=rl-1inplaceofδl-1.Theirweightis(γλ)n-1"
    assert "- one" in Words(markdown.markdown("A list:\n- one\n- two")).found.replace("\n", " ")
