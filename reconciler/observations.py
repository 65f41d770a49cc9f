"""What one look at a session sees: facts, and since when they hold.

"Not known" is a value of its own. Nothing is judged here; `reconciler.state.decide` does.

All times are seconds on a monotonic clock. A wall clock that was set must condemn nobody.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reconciler.layout import Role
from reconciler.restarts import RestartRecord


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process and no other: a pid alone is used again by the kernel."""

    pid: int
    started: int
    """Clock ticks since boot (Linux), microseconds since 1970 (elsewhere)."""
    boot_id: str


@dataclass(frozen=True, slots=True)
class FileId:
    """One state of one directory entry, exact enough to be judged and then removed."""

    device: int
    inode: int
    mtime_ns: int
    size: int
    text: bytes = b""
    """What a pid file says, as far as it was read (64 bytes)."""


class EntryKind(enum.Enum):
    """What stands under one of a session's names."""

    ABSENT = "absent"
    SOCKET = "socket"
    PID = "pid"
    EMPTY = "empty"
    BROKEN = "broken"
    HOSTILE = "hostile"
    UNKNOWN = "unknown"
    NOTE = "note"
    """A launch note."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One look at one of a session's names.

    ``since`` is when the observer first saw the entry in this very state. It, and not
    the file's own time, tells an entry's age.
    """

    kind: EntryKind
    since: float
    file: FileId | None = None
    pid: int = 0
    detail: str = ""
    changed_ns: int = 0
    """When it changed last (``ctime``), if its content was read so much later that no change
    since can bear the same time; else 0."""

    @property
    def present(self) -> bool:
        """Whether anything stands there."""
        return self.kind is not EntryKind.ABSENT


class KeeperState(enum.Enum):
    """What is known of the process that a session's files claim."""

    NONE = "none"
    PROVEN = "proven"
    RECYCLED = "recycled"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True)
class Keeper:
    """The keeper of a session, as far as it can be told."""

    state: KeeperState
    process: ProcessId | None = None
    ours: bool = False
    """It runs our program, so it understands SIGHUP as "bind again"."""
    age: float = 0.0
    """Seconds since the process started, by the kernel's boot clock."""
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process that a session has started: it carries its marker, and is not its agent.

    It is left over once no keeper of the session lives.
    """

    process: ProcessId
    name: str
    """Its program's base name; its arguments may hold secrets."""


class Listening(enum.Enum):
    """What a connect to a session's socket said."""

    NOT_ASKED = "not_asked"
    REFUSED = "refused"
    ANSWERED = "answered"


class AgentState(enum.Enum):
    """What is known of a session's agent. No answer is UNKNOWN, not GONE."""

    ALIVE = "alive"
    GONE = "gone"
    NEVER_SEEN = "never_seen"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Agent:
    """The agent of a session, as far as it can be told."""

    state: AgentState
    since: float
    process: ProcessId | None = None
    proven: bool = False
    """It is known to be this session's agent, so it may be signalled."""
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at one session: facts and since when they hold, no judgement."""

    sid: str
    now: float
    pid_file: Entry
    socket: Entry
    agent_file: Entry
    keeper: Keeper
    listening: Listening
    listener: ProcessId | None
    """Who answers on the socket; None when nobody was asked, or nobody can be named."""
    agent: Agent
    rivals: tuple[Keeper, ...] = ()
    """Other proven keepers of this folder for the same session."""
    remote: bool = False
    """The folder lies on a network filesystem: the keeper may live on another host."""
    seen_alive: bool = False
    """This observer itself saw the keeper of these files alive."""
    leftovers: tuple[Leftover, ...] = ()
    """What it has started, as far as a scan has looked for it."""
    leave: bool = False
    """The user wishes that what it has started is left alone."""
    note: Entry = Entry(EntryKind.ABSENT, 0.0)
    """Its launch note, looked for while its keeper lives and once it is over."""
    record: RestartRecord | None = None
    """What that says of restarts, if it can be read; how it ended is known once it is over."""

    @property
    def entries(self) -> tuple[tuple[Role, Entry], ...]:
        """The files that claim a keeper, in the order of their removal."""
        return (
            (Role.SOCKET, self.socket),
            (Role.AGENT_PID_FILE, self.agent_file),
            (Role.PID_FILE, self.pid_file),
        )

    @property
    def empty(self) -> bool:
        """Nothing of the session is there."""
        return self.over and not self.leftovers and not self.note.present

    @property
    def over(self) -> bool:
        """Neither a claim nor a keeper nor an agent is there, and that is known."""
        claimed = self.pid_file.present or self.socket.present or self.agent_file.present
        return (
            not claimed
            and self.keeper.process is None
            and self.agent.state in {AgentState.GONE, AgentState.NEVER_SEEN}
        )

    @property
    def watched(self) -> frozenset[ProcessId]:
        """The processes whose exit should bring the next look."""
        alive = (
            self.keeper.process if self.keeper.state is not KeeperState.NONE else None,
            self.agent.process if self.agent.state is AgentState.ALIVE else None,
            *(rival.process for rival in self.rivals),
            *(leftover.process for leftover in self.leftovers[:1]),  # the next one after it
        )
        return frozenset(process for process in alive if process is not None)
