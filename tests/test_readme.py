"""README.md: each block is tried by a test, and each link leads somewhere."""

from __future__ import annotations

import re

from lab import README, TOP

TESTS = TOP / "tests"


def test_each_block_of_the_readme_is_used_by_the_file_that_the_tests_own_readme_names() -> None:
    blocks = {
        block.splitlines()[0] for block in re.findall(r"^```\w*\n(.*?)^```$", README, re.M | re.S)
    }
    table = re.findall(r"^\| `(.+)` \| `(.+\.py)` \|$", (TESTS / "README.md").read_text(), re.M)
    assert {first_line for first_line, _ in table} == blocks
    for first_line, name in table:
        assert first_line.removeprefix("# ") in (TESTS / name).read_text(), name


def test_each_link_within_the_readme_leads_to_a_heading() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    # As GitHub and GitLab name them.
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", prose))
    assert links
    assert links <= anchors
