"""What the site does beside mkdocs: files that the pages link to become pages, notebooks too, mathematics becomes MathML, V(s_l)
gets its index, and drawn pictures follow the page's light and dark.

The pages of docs/ link to sources, notebooks and tables by their paths in the checkout, so that they read as they are on a
code-hosting page. Here each such file gets a place of its own in the site: Python and other text under source/, with a heading for
each class and function so that `advantages.py#egae` is an anchor, notebooks with their stored outputs under notebooks/, pictures
and tables as they are. mkdocs then checks all these links and anchors as its own.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
import xml.etree.ElementTree as etree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
DRAWN = re.compile(r'<img ([^>]*?)src="([^":]*)\.svg"([^>]*)>')
PIXELS = re.compile(r'<img [^>]*?src="([^"]+\.png)"[^>]*>')
DARK = re.compile(r"@media\(prefers-color-scheme:dark\)\{((?:[^{}]*\{[^{}]*\})*)\}")
TEXT = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "bash", ".txt": "text", ".json": "json"}
SHOWN = {*TEXT, ".md", ".ipynb", ".csv", ".png", ".svg"}
ASIDE = "---\nsearch: {exclude: true}\nhide: [navigation]\n---\n\n"
PLACES: dict[str, str] = {}
"""Path in the checkout -> place in the site, of all that the site holds."""


def place(path: str) -> str:
    """Where a file of the checkout goes in the site. Pages of docs/ are at its root."""
    if path.startswith("docs/"):
        return "index.md" if path == "docs/README.md" else path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    suffix = posixpath.splitext(path)[1]
    if suffix == ".ipynb":
        return path.removesuffix(".ipynb") + ".md"
    if suffix == ".md" and path.startswith("notebooks/"):
        return path
    return f"source/{path}.md" if suffix in TEXT else f"source/{path}"


def folder_of(path: str) -> str:
    """From where a page's links count."""
    return path if (ROOT / path).is_dir() else posixpath.dirname(path)


def origin(location: str) -> str:
    """The inverse of `place`, for what is there."""
    return next((path for path, at in PLACES.items() if at == location), f"docs/{location}")


def linked(path: str, markdown: str) -> Iterator[str]:
    """Paths, from the checkout's root, of the files and folders that a page links to."""
    for target in (match[2].partition("#")[0] for match in LINK.finditer(markdown)):
        found = posixpath.normpath(posixpath.join(folder_of(path), target))
        if target and ":" not in target and not found.startswith("..") and (ROOT / found).exists():
            yield found


# ------------------------------------------------------------------------------------------------------------- files as pages


def source_page(path: str) -> str:
    """A text file, highlighted; a Python file cut at its classes, methods and functions, which become headings with their names."""
    text, suffix = (ROOT / path).read_text(), Path(path).suffix
    cuts = [(1, 1, "")] if suffix != ".py" else [(1, 1, ""), *_definitions(ast.parse(text))]
    lines, parts = text.splitlines(), [f"{ASIDE}# {path}\n"]
    for (begin, level, name), (end, *_) in zip(cuts, [*cuts[1:], (len(lines) + 1, 0, "")], strict=True):
        if name:
            parts.append(f"{'#' * level} {name.split('.')[-1]} {{#{name}}}\n")
        if body := "\n".join(lines[begin - 1 : end - 1]).strip("\n"):
            parts.append(f"``````{TEXT[suffix]}\n{body}\n``````\n")
    return "\n".join(parts)


def _definitions(tree: ast.AST, within: str = "") -> Iterator[tuple[int, int, str]]:
    """(first line, level of the heading, dotted name) of what is defined at the top of a file or of one of its classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield first, 3 if within else 2, within + node.name
            if isinstance(node, ast.ClassDef) and not within:
                yield from _definitions(node, f"{node.name}.")


def notebook_page(path: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown from its stored outputs, nothing run, and its pictures by name. A picture's alternative text is what
    its notebook says of it `*In words:*` in the next cell."""
    notebook: Any = nbformat.read(ROOT / path, as_version=4)
    words = ""
    for cell in reversed(notebook.cells):
        if cell.cell_type == "markdown":
            described = re.match(r"\*In words:\*\s*(.*?)(?:\n\n|$)", cell.source, flags=re.DOTALL)
            words = " ".join(described[1].split()) if described else words
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["alt"] = re.sub(r"[\[\]`]", "", words)
    exporter = MarkdownExporter(extra_template_basedirs=[str(Path(__file__).parent)], template_name="notebook")
    text, found = exporter.from_notebook_node(notebook, {"output_files_dir": f"{Path(path).stem}_files"})
    return f"{text}\n\nThe notebook itself: `{path}`; `make lab` opens it.\n", found["outputs"]


def page_of(path: str) -> tuple[str, dict[str, bytes]]:
    """A file's or a folder's page, and the pictures that it needs."""
    if (ROOT / path).is_dir():
        files = sorted(file.name for file in (ROOT / path).iterdir() if file.suffix in SHOWN)
        return "\n".join([f"{ASIDE}# {path}\n", *(f"- [{name}]({name})" for name in files)]), {}
    if path.endswith(".ipynb"):
        return notebook_page(path)
    text = (ROOT / path).read_text()
    return (text if path.endswith(".md") else source_page(path)), {}


def on_files(files: Files, config: Any) -> Files:
    """Adds what the pages link to outside of docs/, and what those link to."""
    PLACES.clear()
    PLACES.update({f"docs/{file.src_uri}": file.src_uri for file in files if file.inclusion.is_included()})
    PLACES["docs/README.md"] = "index.md"
    waiting = ["notebooks/README.md"]
    for path in [path for path in PLACES if path.endswith(".md")]:
        waiting += linked(path, (ROOT / path).read_text())
    for file in [file for file in files if file.src_uri.endswith(".svg")]:
        for scheme, drawn in in_schemes(file.content_string).items():
            files.append(File.generated(config, file.src_uri.replace(".svg", f".{scheme}.svg"), content=drawn))
    while waiting:
        path = waiting.pop()
        if path in PLACES or path.startswith("docs/"):
            continue
        PLACES[path] = place(path)
        if not PLACES[path].endswith(".md"):
            files.append(File.generated(config, PLACES[path], abs_src_path=str(ROOT / path)))
            continue
        text, pictures = page_of(path)
        files.append(File.generated(config, PLACES[path], content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(PLACES[path]), name), content=picture))
        waiting += linked(path, text)
    return files


# ------------------------------------------------------------------------------------------------------------------ each page


class Indices(Extension):
    """s_l, V(s_{l-1}) and (γλ)^{n-1} in running text, where a $formula$ would be too much, with <sub> and <sup>.

    Without it two underscores of a proof are an emphasis to Python-Markdown, and a {l-1} at a paragraph's end its attributes.
    A base has one letter, perhaps with a mark over it: cut_value is a name and stays one.
    """

    def extendMarkdown(self, md: Markdown) -> None:
        for tag, pattern in (
            ("sub", r"(?<!\w)[^\W\d_][\u0300-\u036f]?(_(\{[^{}]+\}|\w+))|\|(_(∞))"),
            ("sup", r"(?<![\[\s])(\^(\{[^{}]+\}|\w+|\*))"),
        ):
            processor = Index(pattern, md)
            processor.tag = tag
            md.inlinePatterns.register(processor, tag, 65)  # behind code, links and HTML, before the emphasis at 60


class Index(InlineProcessor):
    tag: str

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[etree.Element, int, int]:  # type: ignore[override]
        whole, index = (1, 2) if m[1] else (3, 4)
        element = etree.Element(self.tag)
        element.text = AtomicString(m[index].strip("{}").replace("-", "−"))
        return element, m.start(whole), m.end(whole)


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(Indices())
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links by the place that a file has in the site."""
    here, at = origin(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target, mark, anchor = match[2].partition("#")
        path = posixpath.normpath(posixpath.join(folder_of(here), target)) if target else ""
        location = PLACES.get(path)
        return f"{match[1]}{posixpath.relpath(location, at or '.')}{mark}{anchor}{match[3]}" if location else match[0]

    return LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show by themselves: no script, no fonts. Drawn pictures once in light and once in dark. A
    figure of pixels opens in its own size: as wide as a telephone its labels are too small to read."""
    content = PIXELS.sub(r'<a class="figure" href="\1" title="in its own size">\g<0></a>', content)
    content = FORMULA.sub(lambda match: formula(html.unescape(match[2]), match[1] == "div"), content)
    return DRAWN.sub(
        lambda match: "".join(
            f'<img class="drawn of-{scheme}" {match[1]}src="{match[2]}.{scheme}.svg"{match[3]}>' for scheme in ("light", "dark")
        ),
        content,
    )


def in_schemes(drawn: str) -> dict[str, str]:
    """An SVG that asks the system for its scheme, as two that do not: the page's own switch chooses between them (theme.css)."""
    return {"light": DARK.sub("", drawn), "dark": DARK.sub(r"\1", drawn)}


def formula(tex: str, block: bool) -> str:
    made: Callable[..., str] = convert
    return f'<span class="formula">{made(tex, display="block" if block else "inline")}</span>'
