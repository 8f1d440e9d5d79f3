"""The set of sockets that wait for requests: who is heard, and who is not any more."""

import asyncio
import socket

from shardmill.server.front.ears import Ears


def test_who_has_something_to_read_is_heard_until_it_is_removed() -> None:
    async def main() -> None:
        ears = Ears(asyncio.get_running_loop())
        heard = asyncio.Queue[str]()
        (first, one), (second, two) = socket.socketpair(), socket.socketpair()

        def hear(name: str, sock: socket.socket) -> None:
            sock.recv(100)
            heard.put_nowait(name)

        with first, one, second, two:
            ears.add(first.fileno(), lambda: hear("first", first))
            ears.add(second.fileno(), lambda: hear("second", second))
            one.send(b"x")
            assert await heard.get() == "first"
            ears.remove(first.fileno())
            one.send(b"x")
            two.send(b"x")
            assert await heard.get() == "second"
            assert heard.empty()
            # An end is heard, too.
            two.close()
            assert await heard.get() == "second"
            ears.close()
            ears.close()
            ears.remove(second.fileno())

    asyncio.run(main())


def test_whoever_asks_is_heard_between_two_pieces_of_large_answers() -> None:
    async def main() -> None:
        ears = Ears(asyncio.get_running_loop())
        seen: list[str] = []
        done = asyncio.Event()
        (near, far), *large = [socket.socketpair() for _ in range(3)]

        def hear() -> None:
            near.recv(100)
            seen.append("heard")

        def step(name: str) -> None:
            seen.append(name)
            far.send(b"x")
            if len(seen) > 5:
                done.set()
                for sock, _ in large:
                    ears.remove_writer(sock.fileno())
                    ears.remove_writer(sock.fileno())

        ears.add(near.fileno(), hear)
        for name, (sock, _) in zip("ab", large, strict=True):
            ears.add_writer(sock.fileno(), lambda name=name: step(name))  # type: ignore[misc]
        await done.wait()
        ears.close()
        assert seen[1::2] == ["heard"] * (len(seen) // 2)
        assert set(seen[::2]) == {"a", "b"}
        for pair in ((near, far), *large):
            for sock in pair:
                sock.close()

    asyncio.run(main())


def test_who_is_removed_by_the_one_heard_before_it_is_not_heard() -> None:
    async def main() -> None:
        ears = Ears(asyncio.get_running_loop())
        heard: list[int] = []
        done = asyncio.Event()
        pairs = [socket.socketpair() for _ in range(2)]

        def hear(place: int) -> None:
            heard.append(place)
            for near, _ in pairs:
                ears.remove(near.fileno())
            done.set()

        for place, (near, far) in enumerate(pairs):
            far.send(b"x")
            ears.add(near.fileno(), lambda place=place: hear(place))  # type: ignore[misc]
        await done.wait()
        ears.close()
        assert len(heard) == 1
        for pair in pairs:
            for sock in pair:
                sock.close()

    asyncio.run(main())
