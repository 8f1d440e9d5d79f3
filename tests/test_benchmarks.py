"""The page of figures: made of what was measured and of nothing else; and that peers of a benchmark do their work."""

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from benchmarks import ahead, client, idle, listing, loading, members, page, plane, serving, sharing
from benchmarks.processes import Spoken, children_of, cpu_of, private, spoken
from benchmarks.table import Row, Samples, markdown, ratio_of
from benchmarks.transforms import HERE, Setting, served
from shardmill import Client
from shardmill.testing.node import running_node
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


def server(name: str, one: float, two: float, first: float, health: str | None = None) -> serving.Server:
    return serving.Server(
        name, lambda shard: shard, health, Samples([one]), Samples([two]), Samples([first]), Samples([first])
    )


def servers() -> list[serving.Server]:
    peers = [server(name, 100.0, 200.0, 1000.0) for name in serving.HELD_TO]
    return [server("shardmill", 190.0, 210.0, 10.0, "http://localhost/healthz"), *peers]


def test_servers_are_held_to_what_each_can_be_beaten_by() -> None:
    rows = {row.what: row for row in serving.rows_of(servers(), Samples([400.0]))}
    assert {row.bar for row in rows.values()} > {"shardmill", *serving.HELD_TO}
    missed = {what for what, row in rows.items() if row.is_met is False}
    assert missed == {
        "shardmill, of one Python process per request: one shard",
        "shardmill, of warm workers, a whole shard each: two at once",
    }
    assert rows["shardmill's first byte, of that of aistore[etl] FastAPI, transform"].samples.median == 0.01
    assert rows["shardmill: slowest health check meanwhile"].samples.median == 10.0


def test_another_function_of_the_servers_has_rates_but_no_targets_and_no_bars() -> None:
    rows = serving.rates_of("Pillow and numpy", servers(), Samples([400.0]))
    assert all(row.what.startswith("Pillow and numpy: ") for row in rows)
    assert {row.is_met for row in rows} == {None}
    assert {row.bar for row in rows} == {""}
    assert sum(row.contest == "rate" for row in rows) == 2 * len(serving.HELD_TO)


def test_bare_processes_say_how_far_each_server_could_be_beaten() -> None:
    rows = {row.what: row for row in serving.rows_of(servers(), Samples([400.0]))}
    for name in serving.HELD_TO:
        assert rows[f"the most that could be had, of {name}: one shard"].samples.median == 4.0
        assert rows[f"the most that could be had, of {name}: two at once"].samples.median == 2.0


def loader(name: str, rate: float) -> loading.Loader:
    # What is made of the figures needs no process.
    nobody = cast(Spoken, None)
    return loading.Loader(name, nobody, rate=Samples([rate]), cpu=Samples([1.0]), total=Samples([2.0]))


def test_a_pipeline_is_beaten_whether_or_not_its_workers_are_kept() -> None:
    loaders = [loader("shardmill.torch", 360.0), *(loader(name, 200.0) for name in loading.HELD_TO)]
    loaders[2].rate.values[:] = [320.0]
    rows = {row.what: row for row in loading.rows_of(loaders, Samples([500.0]))}
    held = {what: row.is_met for what, row in rows.items() if row.is_met is not None and row.contest == "rate"}
    assert held == {
        "shardmill.torch, of WebDataset on the client, 0 workers": True,
        "shardmill.torch, of WebDataset on the client, 2 workers, kept": False,
        "shardmill.torch, of WebDataset on the client, 2 workers, started with the pass": True,
    }
    assert rows["the most that could be had, of WebDataset on the client, 0 workers"].samples.median == 2.5


def test_a_list_has_as_many_shards_however_many_there_are(tmp_path: Path, shards: Path) -> None:
    paths = sorted(shards.glob("*.tar"))[:1]
    names = ahead.copy_shards(paths, tmp_path / "shards")
    assert len(names) == len(set(names)) == ahead.SHARDS
    assert {(tmp_path / "shards" / name).read_bytes() for name in names} == {paths[0].read_bytes()}


def test_a_node_that_is_measured_gives_every_sample_and_a_first_byte(shards: Path) -> None:
    paths = sorted(shards.glob("*train*.tar"))[:1]
    setting = Setting("Pillow and numpy", f"{HERE / 'functions.py'}:crop", Path(sys.executable), (), paths)
    with served(setting, 1) as node:
        assert node.rate(10) > 0
        assert node.first_byte() > 0
        assert node.first_byte(start=3) > 0
        before = node.client.transforms.statistics(node.spec).samples
        node.first_byte(start=3)
        assert node.client.transforms.statistics(node.spec).samples == before + count_samples(paths[0]) - 3
        assert node.first_byte(leave=True) > 0


def test_what_readers_cost_has_everybody_in_it_who_works_for_them(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "READERS", 2)
    monkeypatch.setattr(sharing, "READS", 1)
    paths = sorted(shards.glob("*train*.tar"))[:1]
    setting = Setting("Pillow and numpy", f"{HERE / 'functions.py'}:crop", Path(sys.executable), (), paths)
    rows = sharing.measure(setting, 1, None)
    (cost,) = (row for row in rows if "CPU" in row.what)
    assert cost.what.endswith("2 readers of one URL, of 2 thin loops'")
    assert cost.is_met is None, "only WebDataset's pipelines are what it is held to"
    assert cost.samples.values[0] > 0


def test_a_thin_loop_calls_the_function_on_every_sample(shards: Path, tmp_path: Path) -> None:
    (path,) = sorted(shards.glob("*train*.tar"))[:1]
    (tmp_path / "functions.py").write_text("def count(sample):\n    assert sample['cls'] >= 0 and sample['jpg'].size\n")
    with spoken([sys.executable, HERE / "pipeline.py", "thin", f"{tmp_path / 'functions.py'}:count"]) as loop:
        samples, seconds = loop.ask(path.as_uri())
    assert int(samples) == count_samples(path)
    assert float(seconds) >= 0


def count_samples(path: Path) -> int:
    with tarfile.open(path) as archive:
        return len({member.name.partition(".")[0] for member in archive})


def test_members_are_measured_whether_or_not_there_is_an_nginx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MEMBERS", 20)
    monkeypatch.setattr(members, "REQUESTS", 3)
    rows = members.measure(tmp_path, 2)
    assert "time of the last member, of the first's" in {row.what for row in rows}
    assert all(len(row.samples.values) == 2 and min(row.samples.values) > 0 for row in rows)
    assert "20 members" in rows[0].what


def test_plain_reads_are_counted_and_a_wrong_answer_is_none(tmp_path: Path) -> None:
    asker = plane.Asker(tmp_path)
    with running_node("--bucket", "ais://bench", data=tmp_path / "data") as node, Client(node.endpoint) as client:
        for number in range(plane.OBJECTS):
            if number % 100 == 0:
                client.object(f"ais://bench/small{number:03d}").put(b"x" * 100)
        server = plane.Server(int(node.endpoint.rpartition(":")[2]), node.pid, "/o/ais/bench/")
        kind = plane.Kind("small", "small#00", 4)
        rate, cpu = asker.ask(server, kind, 0.3)
        assert rate > 0
        assert cpu >= 0
        with pytest.raises(subprocess.CalledProcessError):
            asker.ask(server, replace(kind, status=206), 0.3)
        with pytest.raises(subprocess.CalledProcessError):
            asker.ask(server, replace(kind, name="none###"), 0.3)


def test_a_peer_is_named_by_the_url_below_which_its_objects_are(tmp_path: Path) -> None:
    (tmp_path / "small000").write_bytes(b"x" * 100)
    with running_node("--bucket", "ais://bench", data=tmp_path / "data") as node:
        server = plane.Server.at(f"{node.endpoint}/o/ais/bench")
        assert (server.prefix, server.pid, server.address) == ("/o/ais/bench/", None, "127.0.0.1")
        files = tmp_path / "files"
        files.mkdir()
        (tmp_path / "small000").rename(files / "small000")
        plane._store(server, files)
        rate, cpu = plane.Asker(tmp_path).ask(server, plane.Kind("small", "small000", 2), 0.2)
        assert (rate > 0, cpu) == (True, 0)
        with pytest.raises(SystemExit, match="404"):
            plane._store(replace(server, prefix="/none/"), files)
    with pytest.raises(SystemExit):
        plane.Server.at("ftp://localhost/")


def test_idle_nodes_and_listings_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "CONNECTIONS", 50)
    monkeypatch.setattr(listing, "KEYS", 3000)
    monkeypatch.setattr(listing, "PAGES", 2)
    (tmp_path / "idle").mkdir()
    for rows in (idle.measure(tmp_path / "idle", 1), listing.measure(tmp_path / "listing", 2)):
        assert rows
        for row in rows:
            # A few connections take memory that was there.
            assert min(row.samples.values) > 0 or row.unit == "KB", row


def test_the_documentation_shows_the_figures_that_are_kept() -> None:
    sections = page.load()
    assert sections
    assert page.PAGE.read_text(encoding="utf-8") == page.render(sections)
    for chart in (page.CHART, page.RATIOS):
        assert chart.read_bytes().startswith(b"\x89PNG")
        assert f"images/{chart.name}" in page.render(sections)
    for name, section in sections.items():
        assert f"--only {name}" in section.command or section.command.startswith(f"make bench-{name} ")
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_benchmark_that_is_ended_ends_what_it_measures(number: signal.Signals) -> None:
    code = (
        "import sys; from benchmarks.processes import end_when_told, spoken; end_when_told()\n"
        "inner = 'import sys; print(\"ready\", flush=True); sys.stdin.read()'\n"
        "with spoken([sys.executable, '-c', inner]) as process:\n"
        "    print('ready', process.pid, flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=page.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        measured = int(program.stdout.readline().split()[1])
        program.send_signal(number)
        assert program.wait(30) == 128 + number
    deadline = time.monotonic() + 10
    while is_alive(measured):
        assert time.monotonic() < deadline


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_clients_costs_are_taken_with_every_client_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CALLS", 3)
    monkeypatch.setattr(client, "KEYS", 1500)
    monkeypatch.setattr(client, "LARGE", 3 << 20)
    rows = client.measure(tmp_path, 2, None)
    assert all(len(row.samples.values) == 2 and row.samples.median > 0 for row in rows)
    assert [row.what for row in rows if row.at_most is not None] == [
        "CPU of a HEAD",
        "CPU of a GET of 4 KiB",
        "CPU of a PUT of 4 KiB",
    ]
    assert {row.what.rpartition(" by ")[2] for row in rows if " by " in row.what} == {
        "a bare socket",
        "http.client",
        "one",
    }
