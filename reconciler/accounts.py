"""What is sure of messages: which were taken, which never sent, and who was handed a key."""

from __future__ import annotations

import contextlib
import re
from collections import deque

_KEYS_IN_MIND = 8192
# The newest keys of which a writer knows the keeper that they were handed to.


class Account:
    """Messages in order, each a line, and what is known of them. Pure.

    Args:
        data: the lines that are there from the beginning.
        count: how many these are.

    Attributes:
        size: bytes of all that got to the connection.
        taken: messages that the keeper has taken whole.
    """

    __slots__ = ("_count", "_data", "_found", "_refused", "_taken_end", "size", "taken")

    def __init__(self, data: bytes | bytearray, count: int) -> None:
        self.size = len(data)
        self.taken = 0
        self._taken_end = 0  # where the last of them ended
        self._refused = 0  # messages that never got to the connection
        self._data = data
        self._count = count
        self._found: deque[int] | None = None  # `_ends`: most often nobody asks

    @property
    def total(self) -> int:
        """How many messages there are."""
        untaken = self._count if self._found is None else len(self._found)
        return self.taken + untaken + self._refused

    @property
    def complete(self) -> bool:
        """Whether the keeper has taken all that got to the connection."""
        return not self._ends

    @property
    def _ends(self) -> deque[int]:
        """Where the messages end that are not known to be taken: each at its line feed."""
        if self._found is None:
            self._found = deque(found.end() for found in re.finditer(b"\n", self._data))
        return self._found

    def add(self, line: bytes) -> None:
        """One more goes to the connection."""
        self.size += len(line)
        self._ends.append(self.size)

    def withdraw(self, line: bytes) -> None:
        """The last one did not, after all."""
        self.size -= len(line)
        self._ends.pop()

    def refuse(self) -> None:
        """One more could not go to the connection."""
        self._refused += 1

    def strike(self, taken: int) -> None:
        """The keeper has taken so many bytes."""
        while self._ends and self._ends[0] <= taken:
            self._taken_end = self._ends.popleft()
            self.taken += 1

    def unsent(self, handed: int, *, sending: bool) -> int:
        """Messages of which no byte was handed over; one that is being sent may have some."""
        starts = (self._taken_end, *self._ends)[:-1]
        return self._refused + max(0, sum(start >= handed for start in starts) - sending)


class Keys:
    """Which keeper was handed something of a message with a key: the newest ones.

    Without a lock, which a fork could leave locked.
    """

    def __init__(self) -> None:
        self._keepers: dict[tuple[str, str], tuple[int, int]] = {}

    def keeper(self, sid: str, key: str | None) -> tuple[int, int] | None:
        """The keeper's pid and start, or None: nothing was handed over, as far as is known."""
        return None if key is None else self._keepers.get((sid, key))

    def handed(self, sid: str, key: str, keeper: tuple[int, int]) -> None:
        """Remember that this keeper was handed something."""
        self._keepers.pop((sid, key), None)
        self._keepers[sid, key] = keeper
        if len(self._keepers) > _KEYS_IN_MIND:
            with contextlib.suppress(KeyError, RuntimeError):  # another thread was faster
                del self._keepers[next(iter(self._keepers))]
