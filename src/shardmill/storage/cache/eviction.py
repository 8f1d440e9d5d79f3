"""Which cached objects leave when room is needed; pure."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def choose_victims(
    items: Iterable[Item], need: int, least: int, *, size: Callable[[Item], int], used: Callable[[Item], float]
) -> list[Item] | None:
    """Which items to give up, the least recently used first.

    Args:
        items: Those that may go.
        need: Bytes to get.
        least: Bytes without which nothing is gained; at most `need`.
        size: Bytes that an item gives back.
        used: When it was last read.

    Returns:
        Items that give back `need` bytes, or all if that is at least `least`; None if even all give less.
    """
    chosen: list[Item] = []
    freed = 0
    for item in sorted(items, key=used):
        if freed >= need:
            break
        chosen.append(item)
        freed += size(item)
    return chosen if freed >= least else None
