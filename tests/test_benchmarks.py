"""The page of figures: made of what was measured and of nothing else; and that peers of a benchmark do their work."""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.processes import children_of, cpu_of, private, spoken
from benchmarks.table import Row, Samples, markdown, ratio_of
from tests.serving import fonts_are_open

__all__ = ["fonts_are_open"]

SECTION = page.Section(
    "serving",
    "make bench ARGS='--only serving --write'",
    "2026-01-02",
    3,
    "2 cores of a machine",
    "",
    [
        Row("shardmill: one shard", Samples([300.0, 310.0, 290.0]), "/s", bar="shardmill"),
        Row("other: one shard", Samples([350.0, 340.0, 345.0]), "/s", bar="other"),
        Row("shardmill, of other", Samples([0.86, 0.91, 0.84]), "", at_least=1.2, contest="rate"),
        Row("shardmill's CPU, of other's", Samples([0.5, 0.4, 0.6]), "", at_most=0.75, contest="cost"),
    ],
)


def test_what_is_kept_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "FIGURES", tmp_path / "benchmarks.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(page, "CHART", tmp_path / "images" / "benchmarks.png")
    page.keep({"serving": SECTION})
    assert page.load() == {"serving": SECTION}
    assert (tmp_path / "images" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    other = replace(SECTION, name="storing", command="make bench ARGS='--only storing --write'")
    page.keep({"storing": other})
    assert page.load() == {"serving": SECTION, "storing": other}
    text = (tmp_path / "benchmarks.md").read_text()
    assert text == page.render(page.load())
    assert text.count("```sh\nmake bench ") == 2


def test_the_page_says_where_others_are_better_and_what_was_missed() -> None:
    text = page.render({"serving": SECTION})
    losses = text[text.index("## Where shardmill loses") : text.index("## The same shard")]
    assert "- shardmill, of other: 0.86." in losses
    assert "missed it: shardmill, of other, 0.86 (0.84 – 0.91) instead of ≥ 1.2" in losses
    assert "CPU" not in losses.split("And where no figure")[0]
    assert "| shardmill, of other | 0.86 | 0.84 – 0.91 | ≥ 1.2, missed |" in text
    assert "| shardmill's CPU, of other's | 0.50 | 0.40 – 0.60 | ≤ 0.75 |" in text


def test_ratios_are_taken_within_a_round() -> None:
    assert ratio_of(Samples([2.0, 30.0]), Samples([1.0, 10.0])) == Samples([2.0, 3.0])
    assert (
        markdown([Row("x", Samples([1.0]), "ms")]) == "| | median | range |\n|---|---|---|\n| x | 1.0 ms | 1.0 – 1.0 |"
    )


def test_the_documentation_shows_the_figures_that_are_kept() -> None:
    sections = page.load()
    assert sections
    assert page.PAGE.read_text(encoding="utf-8") == page.render(sections)
    assert page.CHART.read_bytes().startswith(b"\x89PNG")
    for name, section in sections.items():
        assert f"--only {name}" in section.command
        assert "--write" in section.command
        assert section.rows
        for row in section.rows:
            assert len(row.samples.values) >= 1
    # Figures are numbers of this one file; the page has no others in its tables.
    table_rows = re.findall(r"^\| (?!\|)(.+?) \| ", page.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(table_rows) == {row.what for section in sections.values() for row in section.rows}
    assert json.loads(page.FIGURES.read_text(encoding="utf-8")).keys() == sections.keys()


def test_a_measured_process_ends_with_what_it_has_started() -> None:
    code = (
        "import subprocess, sys; subprocess.Popen(['sleep', '600']); print('ready 7', flush=True); "
        "print(len(sys.stdin.readline()), flush=True); sys.stdin.read()"
    )
    with spoken([sys.executable, "-c", code]) as process:
        assert process.said == ["7"]
        assert process.ask() == ["3"]
        (child,) = children_of(process.pid)
        assert private(process.pid) > 0
        assert cpu_of(process.pid) >= 0
    assert children_of(process.pid) == []
    # Whoever inherits it may take a moment to collect it.
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
