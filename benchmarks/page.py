"""What was measured, kept as numbers in docs/benchmarks.json, and the page and the chart that are made of them.

A section is measured by one command of its own, so the page names it beside the section's figures.
"""

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import Row, markdown
from shardmill.config import available_cores

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
CHART = ROOT / "docs" / "images" / "benchmarks.png"
RATIOS = ROOT / "docs" / "images" / "benchmarks-http.png"
OURS = "shardmill"

TITLES = {
    "transforms": (
        "Transforming while streaming",
        "A *bare process* only decodes and calls the function, in a loop, on bytes in memory: nothing that also reads, "
        "frames and sends can be faster. The reader, one curl for all shards, has to share the same cores. Every URL "
        "draws afresh and none is announced, so nothing has been made before it is asked for; a *warm* transform has a "
        "worker.",
    ),
    "serving": (
        "The same shard from other servers",
        "Each server has two processes and is read by curl, one shard after the other and two at once. The executor is "
        "written with care: places instead of bytes go to its processes, and they frame their arrays themselves. The "
        "server of `aistore[etl]` runs as its documentation starts it, alone, without a cluster: what AIStore itself "
        "would add is not in these figures. The first byte is that of the tar. The function is torchvision's, and in "
        "the rows that say so one of Pillow and numpy alone, beside the servers that come closest.",
    ),
    "loading": (
        "Batches of 64, as tensors",
        "One pass over all shards, after one that is not counted. Loaders on plain files have nothing to receive and "
        "read no tar; tf.data service runs TensorFlow's own operations, since its graph cannot call Python. "
        "Everything, the node too, shares the same cores: on more machines the store's side would have more of them. "
        "Worker processes that are *kept* stay from pass to pass, as torch's `persistent_workers` has it, which is not "
        "what it does by itself; LitData's are kept, too. Bare processes decode and transform, and do nothing else: "
        "what they reach, of a loader's rate, is the most that anything could.",
    ),
    "workers": (
        "Workers",
        "A version's first request starts its worker; the process that it is forked from has imported the libraries.",
    ),
    "sharing": (
        "Readers of one URL, and finished results",
        "CPU is that of everybody who takes part: node and workers, curls, pipelines with what they start. A "
        "*WebDataset pipeline* reads the stored shard from the same node, decodes it as `pil` and maps the "
        "function; all run at once, as the readers do. It is what a reader would run without transforms in the "
        "store, so the target is held to it. A *thin loop* is what no reader runs: `tarfile`, Pillow and the "
        "function, with no more than these shards need; one is run, alone, and counted for each. Readers by curl "
        "are given tars, as any HTTP client is, and pipelines have arrays; the row with WebDataset on both sides "
        "has arrays on both.",
    ),
    "ahead": (
        "Lists that were announced",
        "The reader takes a shard whole, then works on it without needing a core, as a trainer with an accelerator "
        "does.",
    ),
    "objects": (
        "Stored objects",
        "A *bare sendfile loop* sends one file and cannot do anything else.",
    ),
    "members": (
        "One member of a shard",
        "Read by name, thousands of times over one connection that is kept. A range from nginx is read by who knows "
        "where in the shard the member lies.",
    ),
    "remote": (
        "Buckets of stores",
        "Four objects of 64 MiB by curl, one after the other, while the store, the node and the reader share the same "
        "cores. The node writes all that comes to its disk, and hashes it, before it sends it on.",
    ),
    "plane": (
        "Plain reads, beside nginx",
        "One node and one nginx with one worker, asked in turns by the same reader in C, which shares the cores with "
        "them. Objects of the pool, drawn from 1000; where the reader is the limit, CPU per request tells more than "
        "the rate. A *cold* large file is dropped from memory before each round.",
    ),
    "idle": (
        "A node that does nothing",
        "Each round with a node of its own; the connections are held by a process of their own, and each has had one "
        "answer. What the kernel keeps of a connection is not in these figures.",
    ),
    "listing": (
        "A million objects",
        "In a thousand folders, listed over HTTP, page by page, and by the Python client. Takes about ten minutes; "
        "all but the listings is done once.",
    ),
    "storing": ("Many small objects", ""),
    "writing": (
        "Storing, beside nginx",
        "A blocking client sends them; objects of 64 MiB replace one another, small ones are new. nginx hashes nothing,"
        " keeps no listing and flushes nothing.",
    ),
    "client": (
        "The Python client",
        "CPU of the client's process alone, over thousands of calls to a node on the same machine; each keeps its "
        "connection. A *bare socket* sends requests that were made before, receives into one buffer and looks at no "
        "more of an answer than its length. A PUT waits for the disk, and what runs after a wait of milliseconds finds "
        "its caches cold: the same calls to a server that answers at once cost a third.",
    ),
}
"""Section → its heading and what a reader has to know, in the order of the page."""

HEAD = """# Benchmarks

Every figure here was measured by `make bench`, on one machine, by the command that stands above its table; `make bench`
alone measures all of it on yours and prints it. A machine's own speed drifts, so contestants take turns within each
round, and what counts are ratios within a round. Shown are medians with their range; a target that was missed says so.

![Samples a second of shardmill and of what people use instead, medians and ranges](images/benchmarks.png)

"""


@dataclass(frozen=True)
class Section:
    """One command's figures."""

    name: str
    command: str
    when: str
    rounds: int
    machine: str
    peers: str
    """Versions of what was compared with."""
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        told = {"command": self.command, "when": self.when, "rounds": self.rounds, "machine": self.machine}
        return {**told, "peers": self.peers, "rows": [row.to_json() for row in self.rows]}


def load() -> dict[str, Section]:
    """All that was kept, by name."""
    if not FIGURES.exists():
        return {}
    told: Mapping[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {
        name: Section(name=name, **{**section, "rows": [Row.from_json(row) for row in section["rows"]]})
        for name, section in told.items()
    }


def keep(measured: Mapping[str, Section]) -> None:
    """Put these in place of their former selves, and make page and chart anew."""
    sections = load() | dict(measured)
    ordered = {name: sections[name] for name in TITLES if name in sections}
    lines = json.dumps({name: section.to_json() for name, section in ordered.items()}, ensure_ascii=False, indent=1)
    # A row's values on one line: a new run is then a small change.
    lines = re.sub(r"\[\s+([-0-9., \n]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", lines)
    FIGURES.write_text(f"{lines}\n", encoding="utf-8")
    # From what was kept, whose figures are rounded: the page is the same whenever it is made.
    kept = load()
    PAGE.write_text(render(kept), encoding="utf-8")
    draw(kept, CHART)
    draw_ratios(kept, RATIOS)


def render(sections: Mapping[str, Section]) -> str:
    """The page."""
    text = HEAD + _losses(sections)
    for name, section in sections.items():
        title, about = TITLES[name]
        text += f"## {title}\n\n{_wrapped(about)}"
        if name == "plane":
            text += f"![Rates of shardmill, of nginx's, medians and ranges](images/{RATIOS.name})\n\n"
        text += f"```sh\n{section.command}\n```\n\n"
        text += _wrapped(f"On {section.when}, {section.rounds} rounds: {section.machine}.{section.peers}")
        text += f"{markdown(section.rows)}\n\n"
    return text.rstrip() + "\n"


def _losses(sections: Mapping[str, Section]) -> str:
    """What others do better, and targets that were missed."""
    rows = [row for section in sections.values() for row in section.rows]
    text = "## Where shardmill loses\n\n"
    found = [f"- {row.what}: {row.samples.median:.2f}." for row in rows if row.is_lost]
    found += [f"- Held to a target, and missed it: {row.what}, {_value(row)}." for row in rows if row.is_met is False]
    text += "\n".join(found) + "\n\n" if found else "In none of these figures.\n\n"
    return text + _wrapped(
        "And where no figure is needed: a function that does little, or whose outputs are larger than its inputs while "
        "the link is slow, is better run on the trainer; "
        "[`shardmill bench`](guide/loading.md#where-should-the-function-run) measures it and says so."
    )


def draw(sections: Mapping[str, Section], path: Path) -> None:
    """The chart: rates that have a bar."""
    from matplotlib.figure import Figure

    panels = [(name, TITLES[name][0]) for name in ("serving", "loading") if name in sections]
    if not panels:
        return
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for number, (name, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _bars(axes, [row for row in sections[name].rows if row.bar])
        axes.set_title(title, loc="left")
        axes.set_xlabel("samples a second, median and range")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": ""})


def draw_ratios(sections: Mapping[str, Section], path: Path) -> None:
    """The second chart: rates of nginx's, where 1 is as fast."""
    from matplotlib.figure import Figure

    rows = [
        row
        for name in ("writing", "plane")
        if name in sections
        for row in reversed(sections[name].rows)
        if row.contest == "rate"
    ]
    if not rows:
        return
    figure = Figure(figsize=(11, 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    medians = [row.samples.median for row in rows]
    errors = [
        [row.samples.median - min(row.samples.values) for row in rows],
        [max(row.samples.values) - row.samples.median for row in rows],
    ]
    labels = [row.what.removesuffix(": rate, of nginx's").removesuffix(", of nginx") for row in rows]
    axes.barh(labels, medians, xerr=errors, color="#00897b", ecolor="#455a64", capsize=2)
    axes.axvline(1, color="#455a64", linewidth=1)
    for place, median in enumerate(medians):
        axes.text(0.03, place, f"{median:.2f}", va="center", fontsize=8, color="white")
    axes.set_xlabel("rate, of that of nginx with one worker in the same round")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": ""})


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.samples.median)
    medians = [row.samples.median for row in rows]
    errors = [
        [row.samples.median - min(row.samples.values) for row in rows],
        [max(row.samples.values) - row.samples.median for row in rows],
    ]
    colours = ["#00897b" if row.bar.startswith(OURS) else "#b0bec5" for row in rows]
    axes.barh([row.bar for row in rows], medians, xerr=errors, color=colours, ecolor="#455a64", capsize=2)
    for place, median in enumerate(medians):
        axes.text(max(medians) * 0.01, place, f"{median:.0f}", va="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def describe_machine() -> str:
    """Cores, processor, memory, system and Python."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    system = f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}"
    return f"{available_cores()} cores of {model}, {memory:.0f} GiB, {system}"


def describe_peers(name: str) -> str:
    """Versions, from the locks, of what a section compares with."""
    wanted = {
        "serving": ("aistore", "webdataset", "torch", "torchvision", "pillow"),
        "sharing": ("webdataset", "torchvision", "pillow"),
        "client": ("requests", "httpx", "urllib3"),
        "remote": ("moto", "obstore"),
        "loading": ("webdataset", "spdl", "litdata", "tensorflow-cpu", "torch", "torchvision", "pillow"),
    }.get(name, ())
    locks = "".join(
        (ROOT / "requirements" / f"{lock}.lock").read_text() for lock in ("bench", "bench-tensorflow", "emulators")
    )
    found = [re.search(rf"^{peer}==(\S+)", locks, re.MULTILINE) for peer in wanted]
    versions = ", ".join(f"{peer} {match[1]}" for peer, match in zip(wanted, found, strict=True) if match)
    return f" Compared with {versions}." if versions else ""


def today() -> str:
    return time.strftime("%Y-%m-%d")


def _value(row: Row) -> str:
    _, median, extremes, target = row.cells()
    return f"{median} ({extremes}) instead of {target.removesuffix(', missed')}"


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)) + "\n\n" if text else ""
