"""The pages as a reader meets them: on a telephone and on a desk, in light and in dark, without a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import serve
from looking import faults, look

PAGES = {
    "the front page": "index.html",
    "mathematics": "notebooks/02_truncation_bias.html",
    "a notebook": "notebooks/01_from_ppo_to_tppo.html",
    "wide tables": "findings.html",
    "code": "source/tppo_ref/method/advantages.py.html",
    "diffs": "wrong.html",
    "plain text": "theory.html",
}  # fmt: skip


FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src",
           "object": "data", "use": "href", "image": "href", "input": "src", "track": "src"}  # fmt: skip


class Reader(HTMLParser):
    """Links, anchors, pictures, and whatever a browser would fetch to show a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.fetched: list[str] = []
        self.nameless: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])
        self.fetched += [part.split()[0] for part in given.get("srcset", "").split(",") if part.split()]
        self.fetched += in_css(given.get("style", ""))
        if tag == "img" and not given.get("alt", "").strip():
            self.nameless.append(given.get("src", ""))

    handle_startendtag = handle_starttag


def in_css(text: str) -> list[str]:
    """What a style sheet fetches."""
    return re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)


def of_another_host(targets: list[str]) -> list[str]:
    return [target for target in targets if re.match(r"\s*(\w+:)?//", target) and not target.startswith("http://www.w3.org/")]


@pytest.fixture(scope="module", name="read")
def _read(site: Path) -> dict[Path, Reader]:
    return {path: Reader(path.read_text()) for path in sorted(site.rglob("*.html"))}


def test_no_page_and_no_style_names_anything_on_another_host(site, read):
    found = {str(path): of_another_host(page.fetched) for path, page in read.items()}
    found |= {
        str(path): of_another_host(in_css(path.read_text())) for pattern in ("*.css", "*.svg") for path in site.rglob(pattern)
    }
    found |= {
        str(path): of_another_host(re.findall(r'\b(?:xlink:)?href="([^"]+)"', path.read_text())) for path in site.rglob("*.svg")
    }
    assert {path: targets for path, targets in found.items() if targets} == {}
    assert len(found) > 50


def test_every_picture_is_said_in_words(read):
    assert {str(path): page.nameless for path, page in read.items() if page.nameless} == {}


def test_every_figure_of_pixels_opens_in_its_own_size(read):
    """On a telephone, where its labels are too small to read."""
    shown = {path: {s for s in page.fetched if s.endswith(".png") and "assets/" not in s} for path, page in read.items()}
    not_linked = {str(path): pictures - set(read[path].links) for path, pictures in shown.items()}
    assert {path: pictures for path, pictures in not_linked.items() if pictures} == {}
    assert sum(map(len, shown.values())) > 20


def test_every_link_within_the_site_leads_somewhere(site, read):
    lost = []
    for path, page in read.items():
        if path.name == "404.html":  # its links begin at the host's root
            continue
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:", target):
                continue
            there = (path.parent / target).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            if (
                not there.is_relative_to(site)
                or not there.exists()
                or (anchor and there in read and anchor not in read[there].anchors)
            ):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert lost == []


def test_the_reader_of_pages_sees_what_is_planted():
    page = Reader('<link rel=stylesheet href="https://x/a.css"><img src="//x/b.png" srcset="c.png 1x, http://x/d.png 2x">'
                  '<p style="background:url(https://x/e.png)" id=f><a href="#g">g</a><script src="h.js"></script>')  # fmt: skip
    assert of_another_host(page.fetched) == ["https://x/a.css", "//x/b.png", "http://x/d.png", "https://x/e.png"]
    assert (page.anchors, page.links, page.nameless) == ({"f"}, ["#g"], ["//x/b.png"])
    assert of_another_host(in_css("@import 'https://x/a.css'; a { src: url( \"http://x/f.woff\" ) }")) == [
        "http://x/f.woff",
        "https://x/a.css",
    ]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_a_page_is_whole_at_every_width_and_in_both_schemes(browser, address, page, width, dark):
    found = look(browser, address, page, width=width, dark=dark)
    assert faults(found) == {}
    assert (
        (found.seen["background"] < 80 < 150 < found.seen["ink"])
        if dark
        else (found.seen["ink"] < 80 < 200 < found.seen["background"])
    )


GROUNDS = """
const shown = [...document.querySelectorAll('article img')].filter(i => i.src.endsWith('.svg') && i.checkVisibility());
const mean = c => (c[0] + c[1] + c[2]) / 3, page = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
return [mean(page), ...shown.map(i => { const c = document.createElement('canvas'); [c.width, c.height] = [60, 60];
  c.getContext('2d').drawImage(i, 0, 0, 60, 60); return mean(c.getContext('2d').getImageData(30, 1, 1, 1).data); })];
"""


@pytest.mark.parametrize("system_is_dark", [False, True], ids=["light system", "dark system"])
@pytest.mark.parametrize("switch", ["__palette_0", "__palette_1", "__palette_2"], ids=["as the system", "light", "dark"])
def test_drawn_pictures_follow_the_pages_own_switch(browser, address, switch, system_is_dark):
    """Their ground is as bright as the page, whatever the system prefers."""
    look(browser, address, "index.html", dark=system_is_dark)
    browser.execute_script(f"document.getElementById('{switch}').click()")
    page, *grounds = browser.execute_script(GROUNDS)
    dark = {"__palette_0": system_is_dark, "__palette_1": False, "__palette_2": True}[switch]
    assert (page < 80) == dark
    assert len(grounds) == 3
    assert all((ground < 80) == dark for ground in grounds)


def test_mathematics_is_shown_without_a_script(browser, address):
    for page in ("index.html", PAGES["mathematics"]):
        assert look(browser, address, page).seen["formulas"] >= 1, page


def test_the_code_of_a_notebook_is_folded_its_exercises_are_not_and_its_pictures_are_there(browser, address):
    seen = look(browser, address, PAGES["a notebook"]).seen
    assert (seen["open"], seen["folded"] > 8, seen["images"] >= 3) == (3, True, True)


def test_the_browser_sees_what_is_planted(browser, tmp_path):
    (tmp_path / "index.html").write_text(
        "<body><div style='width:3000px'>wide</div><img src='no.png'><img src='no.png' alt='lost'>"
        "<img src='http://127.0.0.2:9/other.png' alt='elsewhere'><script>console.error('complaint')</script>"
    )
    for address in serve(tmp_path):
        found = faults(look(browser, address, "index.html", width=390))
    assert set(found) == {"console", "elsewhere", "wide", "broken", "unnamed", "scrolls"}
    assert found["elsewhere"] == ["http://127.0.0.2:9/other.png"]


@pytest.mark.parametrize("system_is_dark", [False, True], ids=["light system", "dark system"])
def test_the_widget_alone_has_the_colours_that_the_sites_switch_was_left_at(browser, address, system_is_dark):
    page = "return getComputedStyle(document.documentElement).getPropertyValue('--page').trim()"
    seen = []
    for switch in ("__palette_1", "__palette_2", "__palette_0"):  # light, dark, as the system
        look(browser, address, "index.html", dark=system_is_dark)
        browser.execute_script(f"document.getElementById('{switch}').click()")
        browser.get(f"{address}/widget/index.html")
        seen.append({"#16181d": "dark", "#ffffff": "light"}[browser.execute_script(page)])
    browser.execute_script("localStorage.clear()")
    assert seen == ["light", "dark", "dark" if system_is_dark else "light"]
