"""docs/quality.md: its commands measure every row of its tables, and the report of their records has every column."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from kvarn.quality.settings import QualityRun
from kvarn.quality.tables import COLUMNS, DIFFERENCE_HEADINGS, FRONTIER_HEADINGS, page_headings

DOCUMENT = Path(__file__).parents[3] / "docs" / "quality.md"
MEASURED = ("cache dtype", "setting")  # first headings of tables with one measured row per line
ON_A_PAGE = {
    heading.removesuffix(" (95 %)")
    for headings in (*map(page_headings, COLUMNS), DIFFERENCE_HEADINGS, FRONTIER_HEADINGS)
    for heading in headings
}
SECTIONS = {
    title: body
    for title, _, body in (
        part.partition("\n") for part in re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    )
    if "| cache dtype |" in body or "| setting |" in body
}


def commands(section: str) -> Iterator[dict[str, str]]:
    """Options of the `kvarn quality` commands in a section's console blocks."""
    for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["kvarn", "quality"]:
                found = re.findall(r"--(\w+)(?: ([^-]\S*))?", " ".join(words[2:]))
                yield dict(found)


def tables(section: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Headings and rows of a section's tables of measurements."""
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        headings, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
        if headings[0] in MEASURED:
            yield headings, rows


def test_there_are_sections_with_measurements() -> None:
    assert len(SECTIONS) >= 5


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_says_how_to_measure_it(title: str) -> None:
    formats: set[str] = set()
    options = {field.name for field in fields(QualityRun)} | {"json", "plot"}
    for given in commands(SECTIONS[title]):
        assert given.keys() <= options
        assert given["json"].endswith(".json"), "only a record has all columns"
        formats |= {*QualityRun(dtypes=tuple(given["dtypes"].split(","))).formats}
    for _, rows in tables(SECTIONS[title]):
        for first, *_ in rows:
            named = re.findall(r"`([^`]+)`", first)
            assert {*named} <= formats, f"no command of this section measures {first}"


@pytest.mark.parametrize("title", SECTIONS)
def test_a_report_has_every_column(title: str) -> None:
    for (_, *headings), _ in tables(SECTIONS[title]):
        for heading in headings:
            name = heading.removesuffix(" (95 %)").removesuffix(", pseudo-decode")
            assert name in ON_A_PAGE or re.fullmatch(r"\d+ (to \d+|on)", name), heading
