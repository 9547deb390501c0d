"""docs/wrong.md: every story is a bug of the catalogue, shown as it is planted; its test is there."""

from __future__ import annotations

import re

import pytest
from wrong_page import BY_NAME, PAGE, STORY, evidence, rewrite, where

TEXT = PAGE.read_text()
STORIES = [match[1] for match in STORY.finditer(TEXT)]


def test_every_heading_is_a_story_of_the_catalogue_told_once():
    assert re.findall(r"^### (.+)$", TEXT, flags=re.MULTILINE) == STORIES
    assert len(STORIES) == len(set(STORIES)) >= 15
    assert set(STORIES) <= set(BY_NAME)


def test_the_code_on_the_page_is_the_catalogues():
    assert rewrite(TEXT) == TEXT, "run: python tests/wrong_page.py"


@pytest.mark.parametrize("name", STORIES)
def test_the_named_test_and_the_shown_line_are_there(name):
    bug = BY_NAME[name]
    file, test = bug.test.split("::")
    assert re.search(
        rf"^def {re.escape(test.partition('[')[0])}\(", (PAGE.parents[1] / "tests" / file).read_text(), flags=re.MULTILINE
    )
    assert (PAGE.parents[1] / bug.file).read_text().count(bug.before) == 1


def test_a_story_names_the_function_of_its_line():
    assert where(BY_NAME["rounding is whitened where moments are given"]) == "whiten"
    assert where(BY_NAME["a continued response gets a fresh budget"]).count(".") == 1  # a method, with its class


def test_a_renewed_bug_changes_the_page():
    bug = BY_NAME[STORIES[0]]
    assert evidence(bug._replace(after="something else")) not in TEXT
    assert evidence(bug) in TEXT


def test_the_failures_of_others_are_told_with_where_they_were_read():
    """Five of the authors' port, marked as such, and each of the others with a link to where it was described."""
    told = [match[2] for match in STORY.finditer(TEXT.split("\n## Read in other code\n")[1])]
    assert sum("[P]" in text for text in told) >= 5
    assert all("[P]" in text or re.search(r"\]\(https://github\.com/[\w/-]+/(?:pull|issues)/\d+\)", text) for text in told)
