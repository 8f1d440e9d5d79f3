"""How many reads of one object at once bring it fastest: found by trying; pure.

One more is tried while that brings clearly more; what brought nothing is taken back, and tried again after a while.
"""

MOST = 8  # reads; beyond, stores of clouds give no more to one object

_GAIN = 1.1  # how much faster one more has to be
_SECONDS = 1.0  # one trial
_REST = 16  # trials without a try after one that brought nothing


class Width:
    """Told of all that arrives, and when; `reads` is what to do."""

    def __init__(self, reads: int = 2) -> None:
        self.reads = reads
        self._rate = 0.0
        """The best so far, at one read less than is being tried."""
        self._rest = 0
        self._started: float | None = None
        self._size = 0

    def add(self, size: int, now: float, reads: int) -> None:
        """So many bytes arrived at `now`, with so many reads under way; with fewer than `reads` nothing is learnt."""
        if reads < self.reads:
            self._started = None
            return
        if self._started is None:
            self._started, self._size = now, 0
        self._size += size
        if now - self._started >= _SECONDS:
            self._judge(self._size / (now - self._started))
            self._started = None

    def _judge(self, rate: float) -> None:
        if self._rest:
            self._rest -= 1
            if not self._rest:
                self._rate = rate
                self.reads = min(MOST, self.reads + 1)
        elif rate > self._rate * _GAIN:
            self._rate = rate
            self.reads = min(MOST, self.reads + 1)
        else:
            self.reads = max(1, self.reads - 1)
            self._rest = _REST
