"""Functions over text, registered from this file."""

from typing import Any


def loud(sample: dict[str, Any]) -> dict[str, Any]:
    if "silence" in sample["txt"]:
        raise ValueError("silence is golden")
    sample["txt"] = sample["txt"].upper()
    return sample


def grow(sample: dict[str, Any]) -> dict[str, Any]:
    sample["bin"] = bytes(4_000_000)
    return sample
