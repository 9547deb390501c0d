"""A configuration file as nested sections, strictly: what YAML would resolve in silence, or for ever, is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.tasks.json_lines import check_regular

DEEPEST = 20
"""Levels of a file: a configuration has four."""


class StrictLoader(yaml.SafeLoader):
    """YAML's safe types, without keys that stand twice, aliases (ten lines of which can mean gigabytes), and abysses."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor}: write out what it stands for", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, num in names.items() if num > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} stands there twice", problem_mark=node.start_mark)
        return node


def read_sections(name: str) -> dict[Any, dict[Any, Any]]:
    """The sections of a YAML or JSON file. UserError where it cannot be read, or is no mapping of mappings."""
    content = _content(name, "config")
    sections = content if isinstance(content, dict) else {"the file": content}
    for section, fields in sections.items():
        if not isinstance(fields, dict):
            lines = "`section:` with `field: value` lines under it"
            raise UserError(refusal("config", f"{name} with {section}: {str(fields)[:100]!r}", lines))
    return sections


def read_fields(name: str, section: str) -> dict[Any, Any]:
    """The fields of a section's own file. UserError where it cannot be read, or is no mapping."""
    content = _content(name, section)
    if not isinstance(content, dict):
        raise UserError(refusal(section, f"{name} with {str(content)[:100]!r}", "fields, as `field: value` lines"))
    return content


def _content(name: str, field: str) -> Any:
    try:
        path = Path(name)
        if path.exists():
            check_regular(path, field)
        return StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise UserError(refusal(field, name, "a file that can be read", f"{error.strerror}; give another")) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(refusal(field, name, "YAML or JSON", " ".join(str(error).split())[:200])) from None
