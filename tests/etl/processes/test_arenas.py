"""Memory that a worker writes and the node reads: given up at once, whoever is still being sent from it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardmill.etl.processes.arenas import Piece, SharedArena

SIZE = 1 << 20


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:shardmill-arena")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_closed_arena_is_unmapped_when_its_last_piece_is_released() -> None:
    with no_garbage_collection():
        before = mappings()
        arena = SharedArena(SIZE)
        released: list[Piece] = []
        pieces = [Piece(arena.view[start : start + 1000], start, 999, released.append) for start in (4096, 8192)]
        assert mappings() == before + 1
        for piece in pieces:
            piece.is_pinned = True
            piece.evacuate()
        arena.close()
        assert mappings() == before + 1
        assert bytes(pieces[0].data) == bytes(1000)
        for piece in pieces:
            piece.release()
        # The arena itself is still referred to here, as by a dead worker that is not yet collected.
        assert mappings() == before
        assert released == pieces


def test_evacuated_pieces_need_no_arena() -> None:
    with no_garbage_collection():
        before = mappings()
        arena = SharedArena(SIZE)
        released: list[Piece] = []
        piece = Piece(arena.view[4096:5096], 4096, 999, released.append)
        piece.evacuate()
        arena.close()
        assert mappings() == before
        assert released == [piece]
        assert bytes(piece.data) == bytes(1000)
        part = piece.data[:500]
        assert isinstance(part, memoryview)  # of bytes it would be a copy
        part.release()
        piece.release()
        assert released == [piece]
        assert piece.data == b""
