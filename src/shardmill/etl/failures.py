"""Failures of samples and runs, kept so that they can be read back after the answer is gone.

A file of JSON lines a version; the first 100 failures are kept in full, later ones are counted.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from shardmill.core.api import FailureInfo, Failures

logger = logging.getLogger(__name__)

KEPT = 100  # in full, per version
_RECENT = 1000  # of all versions in memory beside them, so that the newest request can always be explained


_LINKED = 10_000  # requests that shared another's run and can still be explained


class FailureLog:
    """Appends are immediate and small; a failing disk loses records, never a run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: dict[str, list[FailureInfo]] = {}
        self._counts: dict[str, int] = {}
        self._recent: deque[FailureInfo] = deque(maxlen=_RECENT)
        self._links: OrderedDict[str, str] = OrderedDict()
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.glob("*.jsonl")):
            self._load(path)

    def record(self, failure: FailureInfo) -> None:
        failure = _printable(failure)
        label = failure.transform
        self._counts[label] = self._counts.get(label, 0) + 1
        self._recent.append(failure)
        kept = self._kept.setdefault(label, [])
        if len(kept) >= KEPT:
            return
        kept.append(failure)
        try:
            with open(self._path(label), "ab") as file:
                file.write(msgspec.json.encode(failure) + b"\n")
        except OSError as error:
            logger.warning("a failure of %s is not kept on disk: %s", label, error.strerror)

    def link(self, request: str, first: str) -> None:
        """A request is answered by the run of another: what failed there failed for both."""
        self._links[request] = first
        if len(self._links) > _LINKED:
            self._links.popitem(last=False)

    def find(
        self,
        *,
        transform: str | None = None,
        bucket: str | None = None,
        key: str | None = None,
        request: str | None = None,
    ) -> Failures:
        """Failures that match all that is given, oldest first.

        Args:
            transform: A name, `name@digits`, or that and `,args=`.
            bucket: `provider://name`.
            key: Of the shard, or of the sample.
            request: Request id.
        """
        checks: list[Callable[[FailureInfo], bool]] = []
        if transform is not None:
            checks.append(lambda failure: _is_of(failure.transform, transform))
        if bucket is not None:
            checks.append(lambda failure: failure.bucket == bucket)
        if key is not None:
            checks.append(lambda failure: key in (failure.object, failure.sample))
        if request is not None:
            asked = self._links.get(request, request)
            checks.append(lambda failure: failure.request == asked)
        known = {id(failure): failure for kept in self._kept.values() for failure in kept}
        known |= {id(failure): failure for failure in self._recent}
        found = sorted(
            (item for item in known.values() if all(check(item) for check in checks)), key=lambda item: item.time
        )
        total = len(found)
        if bucket is None and key is None and request is None:
            total = sum(count for label, count in self._counts.items() if transform is None or _is_of(label, transform))
        return Failures(found, max(total, len(found)))

    def forget(self, label: str) -> None:
        """The version is removed."""
        self._kept.pop(label, None)
        self._counts.pop(label, None)
        self._path(label).unlink(missing_ok=True)

    def _path(self, label: str) -> Path:
        return self._directory / f"{label}.jsonl"

    def _load(self, path: Path) -> None:
        label = path.name.removesuffix(".jsonl")
        try:
            lines = path.read_bytes().splitlines()
        except OSError:
            return
        kept = self._kept.setdefault(label, [])
        for line in lines[:KEPT]:
            try:
                kept.append(msgspec.json.decode(line, type=FailureInfo))
            except msgspec.MsgspecError:
                # The last line may be torn by a kill.
                continue
        self._counts[label] = len(kept)


def _printable(failure: FailureInfo) -> FailureInfo:
    """With names that are not UTF-8, and what a function said in such, escaped: JSON cannot hold them."""
    texts = {name: value for name in failure.__struct_fields__ if isinstance(value := getattr(failure, name), str)}
    return msgspec.structs.replace(
        failure, **{name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()}
    )


def _is_of(label: str, transform: str) -> bool:
    wanted, _, wanted_args = transform.partition(",")
    known, _, known_args = label.partition(",")
    name, at, digits = wanted.partition("@")
    known_name, _, known_digits = known.partition("@")
    is_same_code = name == known_name and (not at or known_digits.startswith(digits[: len(known_digits)]))
    return is_same_code and wanted_args in ("", known_args)
