"""`shardmill demo` as a user meets it: what it writes, what it says, and that nothing runs on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from shardmill.cli import photographs
from shardmill.cli.main import run

SECONDS = 60.0


def save_picture(path: Path, size: tuple[int, int] = (300, 200), *, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plane = np.random.default_rng(len(path.name)).integers(0, 256, (9, 12, 3), np.uint8)
    exif = PIL.Image.Exif()
    if orientation != 1:
        exif[PIL.ExifTags.Base.Orientation] = orientation
    PIL.Image.fromarray(plane).resize(size).save(path, exif=exif)
    return path


def stored_samples(directory: Path) -> Iterator[tuple[bytes, int]]:
    """Picture and class, in the order of the shards."""
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as archive:
            label = None
            for member in archive:
                payload = archive.extractfile(member)
                assert payload is not None
                if member.name.endswith(".cls"):
                    label = int(payload.read())
                else:
                    assert label is not None
                    yield payload.read(), label


def test_photographs_are_packed_served_transformed_and_drawn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photographs, "CROPS", 12)
    out = tmp_path / "new" / "out"

    assert run(["demo", "--out", str(out)]) == 0

    printed, said = capfd.readouterr()
    samples = list(stored_samples(out / "shards"))
    assert len(samples) == 12 * len(photographs.PHOTOGRAPHS)
    assert {label for _, label in samples} == set(range(len(photographs.PHOTOGRAPHS)))
    assert len({PIL.Image.open(io.BytesIO(jpeg)).size for jpeg, _ in samples}) > len(samples) // 2
    assert f"packed {len(samples)} pictures of 12 classes into 2 shards" in said
    assert said.endswith("the node is stopped again; with --keep it stays, to be tried\n")
    assert re.search(r"^http://127\.0\.0\.1:\d+/t/ais/demo/imagenet-train@[0-9a-f]{12},seed=1,", printed)
    assert f"  {len(samples)} samples in " in printed
    assert re.search(r"on \d+ cores?\n  first byte after \d+ ms\n  .* MiB stored, .* MiB received\n", printed)
    with PIL.Image.open(out / "before-after.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 1000 < sheet.height
        assert len(sheet.getcolors(1 << 24) or ()) > 50_000  # photographs, not empty cells


def test_packing_the_photographs_again_gives_the_same_bytes_and_removes_older_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photographs, "SAMPLES_PER_SHARD", 5)
    monkeypatch.setattr(photographs, "CROPS", 2)
    first = photographs.pack_photographs(tmp_path / "a")
    monkeypatch.setattr(photographs, "CROPS", 1)
    again = photographs.pack_photographs(tmp_path / "a")
    other = photographs.pack_photographs(tmp_path / "b")

    assert len(first.shards) == 5 > len(again.shards) == 3
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == again.shards == other.shards
    for name in again.shards:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.size == sum((tmp_path / "a" / name).stat().st_size for name in again.shards)


def test_own_pictures_get_their_directories_as_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own"
    plain = save_picture(own / "cats" / "a.jpg")
    save_picture(own / "cats" / "deep" / "b.png")
    save_picture(own / "dögs" / "turned.jpg", (300, 200), orientation=6)
    save_picture(own / "dögs" / "large.JPEG", (2600, 1300))
    (own / "cats" / "broken.jpg").write_bytes(plain.read_bytes()[:2000])
    (own / "cats" / "text.png").write_text("no picture")
    (own / "cats" / ".hidden.jpg").write_text("not looked at")
    (own / "cats" / "notes.txt").write_text("not looked at")

    assert run(["demo", "--images", str(own), "--out", str(tmp_path / "out")]) == 0

    _, said = capfd.readouterr()
    samples = list(stored_samples(tmp_path / "out" / "shards"))
    sizes = {PIL.Image.open(io.BytesIO(jpeg)).size: label for jpeg, label in samples}
    assert sorted(label for _, label in samples) == [0, 0, 1, 1]
    assert sizes == {(300, 200): 0, (200, 300): 1, (1024, 512): 1}
    assert (plain.read_bytes(), 0) in samples  # a good JPEG is not encoded again
    assert f"skipped {own}/cats/broken.jpg: image file is truncated" in said
    assert f"skipped {own}/cats/text.png: not a picture\n" in said
    assert "hidden" not in said
    assert "packed 4 pictures of 2 classes into 1 shard " in said


def test_pictures_without_directories_are_all_of_class_0(tmp_path: Path) -> None:
    save_picture(tmp_path / "own" / "a.jpg")
    save_picture(tmp_path / "own" / "b.jpg")
    packed = photographs.pack_pictures(tmp_path / "own", tmp_path / "shards")
    assert packed.classes == [""]
    assert [label for _, label in stored_samples(tmp_path / "shards")] == [0, 0]


def test_of_very_many_pictures_some_of_every_class_are_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photographs, "MAX_PICTURES", 4)
    for name in ("a/1", "a/2", "a/3", "a/4", "b/1"):
        save_picture(tmp_path / "own" / f"{name}.jpg")
    packed = photographs.pack_pictures(tmp_path / "own", tmp_path / "shards")
    assert packed.pictures == 4
    assert [label for _, label in stored_samples(tmp_path / "shards")] == [0, 1, 0, 0]
    assert "5 pictures in" in capfd.readouterr().err


def test_existing_shards_are_served_as_they_stand(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in shards.iterdir())
    assert run(["demo", "--shards", str(shards), "--out", str(tmp_path)]) == 0
    printed, _ = capfd.readouterr()
    assert "~imagenet-train-000000.tar" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["before-after.png"]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in shards.iterdir()) == before


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("--images missing", "--images missing: no such directory"),
        ("--images empty", "--images empty: no pictures in it or below"),
        ("--images bad", "--images bad: none of its 1 pictures can be read"),
        ("--shards missing", "--shards missing: no such directory"),
        ("--shards empty", "--shards empty: no .tar files in it"),
        ("--images bad --shards empty", "--shards and --images exclude each other"),
        ("--out file", "--out file is a file; name a directory"),
        ("--out file/below", "--out file/below: Not a directory; name a directory that can be written"),
        ("--out /proc/demo", "--out /proc/demo: "),
    ],
)
def test_a_wrong_call_is_one_line_and_starts_nothing(
    call: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_text("no picture")
    (tmp_path / "file").touch()
    assert run(["demo", *call.split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"shardmill: {said}")
    assert "a node serves" not in err


def test_without_scikit_image_the_demo_names_the_extra(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)  # as if it were not installed
    assert run(["demo", "--out", str(tmp_path)]) == 1
    err = capfd.readouterr().err
    assert "pip install 'shardmill[demo]'" in err
    assert "--images DIR" in err


def test_shards_without_pictures_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "text.tar", "w") as archive:
        member = tarfile.TarInfo("0.txt")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    assert run(["demo", "--shards", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "text.tar has no pictures (jpg, jpeg, png, webp)" in capfd.readouterr().err


def test_a_broken_shard_is_an_error_not_a_short_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_picture(tmp_path / "own" / "a.jpg")
    packed = photographs.pack_pictures(tmp_path / "own", tmp_path / "shards")
    shard = tmp_path / "shards" / packed.shards[0]
    shard.write_bytes(shard.read_bytes()[:3000])
    assert run(["demo", "--shards", str(tmp_path / "shards"), "--out", str(tmp_path)]) == 1
    assert "is no whole shard" in capfd.readouterr().err
    assert not (tmp_path / "before-after.png").exists()


class Demo:
    """The command as a process of its own, whose lines are read as they come."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "shardmill.cli", "demo", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []

    def wait_line(self, text: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"it ended without {text!r}:\n{''.join(self.lines)}")

    def descendants(self) -> set[int]:
        found: set[int] = set()
        pending = [self.process.pid]
        while pending:
            for children in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
                pids = [int(pid) for pid in children.read_text().split()]
                found.update(pids)
                pending += pids
        return found

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        self.lines += self.process.stdout.readlines()
        return self.process.wait(SECONDS)


@pytest.fixture
def demo(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Demo]:
    save_picture(tmp_path / "own" / "a" / "1.jpg")
    save_picture(tmp_path / "own" / "b" / "2.jpg")
    running = Demo("--images", str(tmp_path / "own"), "--out", str(tmp_path / "out"), *request.param)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        assert running.process.stdout is not None
        running.process.stdout.close()


def wait_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while left := {pid for pid in pids if is_running(pid)}:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("demo", [["--keep"]], indirect=True)
def test_with_keep_the_node_answers_until_ctrl_c(demo: Demo, tmp_path: Path) -> None:
    demo.wait_line("the node runs on until Ctrl-C")
    url = demo.wait_line("curl").split("'")[1]
    pids = demo.descendants()

    with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=answer, mode="r|") as archive:
        names = [member.name for member in archive]
    assert names == ["000000.cls", "000000.crop.json", "000000.npy", "000001.cls", "000001.crop.json", "000001.npy"]
    assert (tmp_path / "out" / "before-after.png").exists()

    assert demo.end(signal.SIGINT) == 0, demo.lines
    assert len(pids) >= 2
    wait_gone(pids)


@pytest.mark.parametrize("demo", [[]], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_stops_the_node_as_well(demo: Demo, number: signal.Signals) -> None:
    demo.wait_line("a node serves")
    pids = demo.descendants()

    assert demo.end(number) == 130
    assert not any("Traceback" in line for line in demo.lines)
    assert pids
    wait_gone(pids)


@pytest.mark.parametrize("demo", [["--keep"]], indirect=True)
def test_what_the_demo_proposes_to_try_works(demo: Demo) -> None:
    demo.wait_line("the node runs on until Ctrl-C")
    export, *commands = [demo.wait_line("  ").strip() for _ in range(4)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        shown = f"shardmill {command.split(' ', 1)[1]}"
        done = subprocess.run(
            ["bash", "-c", f"{export}; {shown}"], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert (done.returncode, bool(done.stdout)) == (0, True), f"{shown}\n{done.stderr}"
    assert demo.end(signal.SIGINT) == 0


def test_the_crop_that_is_drawn_is_the_one_that_was_taken(tmp_path: Path) -> None:
    """A draw, undone, is the box of the stored picture that its `crop.json` names."""
    from shardmill.cli.train_transform import DEVIATION, MEAN, train_transform

    jpeg = save_picture(tmp_path / "a.jpg", (320, 210)).read_bytes()
    seen = set()
    for _ in range(20):
        stored = PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")
        sample = train_transform({"__key__": "a", "jpg": stored, "cls": 3})
        assert set(sample) == {"__key__", "cls", "npy", "crop.json"}
        assert (sample["npy"].shape, sample["npy"].dtype) == ((224, 224, 3), np.float32)
        crop = json.loads(json.dumps(sample["crop.json"]))
        expected = stored.crop(crop["box"]).resize((224, 224), PIL.Image.Resampling.BILINEAR)
        if crop["mirrored"]:
            expected = expected.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        drawn = (sample["npy"] * DEVIATION + MEAN) * 255
        assert np.abs(drawn - np.asarray(expected, np.float32)).max() < 0.01
        seen.add((tuple(crop["box"]), crop["mirrored"]))
    assert len(seen) > 10
    assert {mirrored for _, mirrored in seen} == {False, True}
