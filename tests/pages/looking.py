"""One look at a page in the browser: what it asked for, what it complained of, and what does not fit its width."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

SEEN = """
const wide = [], room = document.documentElement.clientWidth;
const scrolls = e => { for (; e && e !== document.body; e = e.parentElement) {
  if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true; } return false; };
for (const e of document.body.querySelectorAll('*')) {
  const box = e.getBoundingClientRect(), seen = e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
  if (seen && box.width > 0 && box.right > room + 1 && box.left < room && !scrolls(e.parentElement)) wide.push(e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40));
}
const shown = [...document.images];
const light = colour => { const c = colour.match(/[\\d.]+/g).map(Number); return (c[0] + c[1] + c[2]) / 3; };
return {
  wide, scroll: document.documentElement.scrollWidth - room,
  broken: shown.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
  unnamed: [...shown.filter(i => !i.alt.trim()), ...[...document.querySelectorAll('svg[role=img]')].filter(
    s => !(s.getAttribute('aria-label') || s.querySelector('title'))), ...document.querySelectorAll('article svg:not([role=img]):not([aria-hidden])')
    ].map(e => e.outerHTML.slice(0, 90)).filter(s => !s.includes('viewBox="0 0 24 24"')),
  images: shown.length, formulas: [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().width > 5).length,
  background: light(getComputedStyle(document.body).backgroundColor), ink: light(getComputedStyle(document.querySelector('article') || document.body).color),
  open: document.querySelectorAll('article details[open]').length, folded: document.querySelectorAll('article details:not([open])').length,
};
"""


@dataclass(frozen=True)
class Look:
    """What was seen of a page at one width in one scheme."""

    seen: dict[str, Any]
    complaints: list[str]
    elsewhere: list[str]


def look(browser: Any, address: str, page: str, *, width: int = 1280, dark: bool = False) -> Look:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")  # what came before
    browser.get(f"{address}/{page}")
    browser.execute_script("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
    browser.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => setTimeout(done, 100))"
    )
    seen = browser.execute_script(SEEN)
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked, "nothing was asked for: the traffic was not seen"
    return Look(seen, complaints, [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:", "about:"))])


def faults(found: Look) -> dict[str, Any]:
    """What is wrong with a page, by kind; nothing where all is well."""
    kinds = {"console": found.complaints, "elsewhere": found.elsewhere, **{k: found.seen[k] for k in ("wide", "broken", "unnamed")}}
    return {kind: what for kind, what in kinds.items() if what} | (
        {"scrolls": found.seen["scroll"]} if found.seen["scroll"] > 0 else {}
    )
