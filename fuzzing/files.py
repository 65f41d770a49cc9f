"""Files that others write: pid files, the dashboard's registry, settings, a process's name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from fuzzing.target import Check, Target, expect, pure
from reconciler import keeper_process
from reconciler.folder import PID_FILE_LIMIT, Folder
from reconciler.ladder import Ladder
from reconciler.layout import PREFIX
from reconciler.logs import LogSettings
from reconciler.observations import Entry, EntryKind
from reconciler.processes import SYSTEM
from reconciler.registry import Registry
from reconciler.rpc_writer import WritePolicy
from reconciler.schema import KEYS, TABLES
from reconciler.settings import Settings, SettingsError, Sources, parse
from reconciler.state import Policy

LARGEST_PID = 2**31 - 1
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - folders of our own in it
"""Files that are written so often are kept off the disk, where that is possible."""

_PID = re.compile(rb"[0-9]{1,63}\n?")


def written_pid(text: bytes) -> int | None:
    """The pid that a file's whole text says: ASCII digits, and one LF at most."""
    if not _PID.fullmatch(text) or len(text) >= PID_FILE_LIMIT:
        return None
    pid = int(text)
    return pid if 1 <= pid <= LARGEST_PID else None


@contextlib.contextmanager
def pid_files() -> Iterator[Check]:
    """A real file, read by the reconciler and by the keeper."""
    with (
        tempfile.TemporaryDirectory(prefix="pi-", dir=MEMORY) as place,
        Folder(Path(place)) as folder,
    ):
        keepers = keeper_process.Folder(os.fsencode(place))
        name = "a.rpc.sock.pid"
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder.fd)

        def check(text: bytes) -> None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)
            _judge_pid_file(text, folder.pid_entry(name, 1.0), keepers.read_pid(name))

        try:
            yield check
        finally:
            os.close(descriptor)
            os.close(keepers.fd)


def _judge_pid_file(text: bytes, entry: Entry, keepers: int | None) -> None:
    pid = written_pid(text)
    kind = EntryKind.EMPTY if not text else EntryKind.BROKEN if pid is None else EntryKind.PID
    expect(entry.kind is kind, f"{text!r} is {entry.kind}, not {kind}")
    expect(entry.pid == (pid or 0), f"{text!r} says {entry.pid}, not {pid}")
    expect(entry.file is not None and entry.file.text == text[:PID_FILE_LIMIT], "another text")
    # The keeper asks only for its own pid and a predecessor's: it may know less, not else.
    whole = text.strip()
    allowed = {None, int(whole) if whole.isdigit() else None}
    expect(keepers in allowed, f"the keeper reads {keepers} from {text!r}")
    expect(keepers is None or 1 <= keepers <= LARGEST_PID, f"the keeper reads {keepers}")
    plain = pid is not None and text == b"%d" % pid
    expect(not plain or keepers == pid, f"the keeper does not read {text!r}")


@contextlib.contextmanager
def registry_files() -> Iterator[Check]:
    """A real registry file, asked for the agent of every session and keeper that it names."""
    with tempfile.TemporaryDirectory(prefix="pi-", dir=MEMORY) as place:
        path = Path(place, "headless-pids.json")

        def check(text: bytes) -> None:
            path.write_bytes(text)
            complaints: list[str] = []
            registry = Registry(path, complaints.append)
            registry.agent_pid("a", 7)
            by_socket, by_keeper = _registered(text)
            if complaints:  # of a lone surrogate, too, which the standard library reads
                expect(by_socket is None or b"\\u" in text, f"complains: {complaints[0]}")
                by_socket, by_keeper = {}, {}
            expect(by_socket is not None, f"takes {text!r}")
            for sid in {"a", "b", *(_sid(name) for name in by_socket or ())}:
                for keeper in {0, 7, *by_keeper}:
                    found = registry.agent_pid(sid, keeper)
                    known = (by_socket or {}).get(f"{sid}.rpc.sock") or by_keeper.get(keeper)
                    expect(found == known, f"{sid!r}, {keeper} has agent {found}, not {known}")
                    expect(found is None or _is_pid(found), f"{found!r} is no pid")
            expect(len(complaints) <= 1, f"said {len(complaints)} times")

        yield check


def _sid(name: str) -> str:
    return name.removesuffix(".rpc.sock")


def _registered(text: bytes) -> tuple[dict[str, int] | None, dict[int, int]]:
    """What a registry says by the standard library's reader; None when that refuses it."""
    by_socket: dict[str, int] = {}
    by_keeper: dict[int, int] = {}
    try:
        content = json.loads(text.decode(), parse_constant=_refuse, parse_float=_number)
        entries = content["entries"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None, {}
    if not isinstance(entries, list):
        return None, {}
    for entry in entries:
        agent = entry.get("piPid") if isinstance(entry, Mapping) else None
        if _is_pid(agent):
            path, keeper = entry.get("keeperSockPath"), entry.get("keeperPid")
            if isinstance(path, str):
                by_socket[path.rpartition("/")[2]] = agent
            elif _is_pid(keeper):
                by_keeper[keeper] = agent
    return by_socket, by_keeper


def _refuse(word: str) -> NoReturn:
    raise ValueError(word)


def _number(digits: str) -> float:
    """A number that is none of JavaScript's is refused, not taken for infinity."""
    return float(digits) if math.isfinite(float(digits)) else _refuse(digits)


def _is_pid(value: object) -> TypeGuard[int]:
    return type(value) is int and 1 < value <= LARGEST_PID


def check_settings(text: bytes) -> None:
    """Settings are refused in words, or are of the right types and within their borders."""
    try:
        settings = parse(text)
    except SettingsError as error:
        expect(str(error).startswith("settings: "), f"{error} does not say where")
        return
    _judge_settings(settings)


def check_variable(text: bytes) -> None:
    """So are those of a variable, whatever a name stands for; its text has no NUL."""
    name, _, value = text.replace(b"\0", b"").partition(b"=")
    variables = {PREFIX + os.fsdecode(name): os.fsdecode(value)}
    try:
        settings = Sources(Path("none"), named=False, text=b"", variables=variables, flags={})
        _judge_settings(settings.settings())
    except SettingsError as error:
        expect(str(error).startswith(("environment: ", "[")), f"{error} does not say where")


def _judge_settings(settings: Settings) -> None:
    texts = (*settings.programs, *settings.keeper_command, *settings.agent_command)
    expect(all(type(text) is str for text in texts), f"{texts} are no texts")
    expect(settings.sessions_dir is None or isinstance(settings.sessions_dir, Path), "no path")
    log = settings.log or LogSettings()
    expect(log.level in {"debug", "info", "warning", "error"}, "log level")
    expect(log.form in {"auto", "console", "json"}, "log form")
    policy = settings.policy or Policy()
    expect(policy.leftovers in {"report", "stop"}, "what is done about leftovers")
    seconds = [settings.resync]
    for room, value in ((Policy, settings.policy), (Ladder, settings.ladder)):
        if value is not None:
            expect(type(value) is room, f"{value} is no {room}")
            seconds += [each for each in dataclasses.astuple(value) if not isinstance(each, str)]
    expect(all(0 < each <= 86_400 for each in seconds), f"{seconds} are out of bounds")
    if settings.write is not None:
        _judge_write(dataclasses.asdict(settings.write))


def _judge_write(write: dict[str, Any]) -> None:
    for name, value in write.items():
        match getattr(WritePolicy(), name):
            case tuple():
                good = all(0 <= each <= 86_400 for each in value)
            case float():
                good = 0 < value <= 86_400
            case _:
                good = type(value) is int and 1 <= value <= 1000
        expect(good, f"write.{name} is {value!r}")


@contextlib.contextmanager
def process_names() -> Iterator[Check]:
    """This process under any name that the kernel lets it have: its facts stay the same.

    The name stands in the middle of the line of ``/proc/<pid>/stat``, unescaped.
    """
    descriptor = os.open("/proc/self/comm", os.O_RDWR)
    before = os.read(descriptor, 64).rstrip(b"\n")
    facts = SYSTEM.facts(os.getpid())
    told = (facts.process, facts.parent, facts.group, facts.session, facts.uid, False, False)

    def check(text: bytes) -> None:
        os.write(descriptor, text)
        now = SYSTEM.facts(os.getpid())
        seen = (now.process, now.parent, now.group, now.session, now.uid, now.dying, now.kernel)
        expect(seen == told, f"under the name {text!r} this process is {seen}, not {told}")

    try:
        yield check
    finally:
        os.write(descriptor, before)
        os.close(descriptor)


def _entries(*entries: object) -> bytes:
    return json.dumps({"entries": entries}).encode()


TARGETS = (
    Target(
        "pid-file",
        pid_files,
        (
            *(b"", b"1", b"4194304", b"2147483647", b"2147483648", b"0", b"12\n", b"12\n\n"),
            *(b"-1", b"+1", b" 12", b"1_2", b"\xc2\xb2", b"0" * 63 + b"1", b"0" * 62 + b"1"),
            *(b"0" * 61 + b"12\n", b"12\0", b"9" * 64),
        ),
        (b"\n", b"0" * 16, b" " * 16, b"2147483647", b"\xd9\xa3", b"\xef\xbc\x91"),
        longest=80,
    ),
    Target(
        "registry",
        registry_files,
        (
            _entries(),
            _entries({"piPid": 12, "keeperSockPath": "/x/a.rpc.sock"}),
            _entries({"piPid": 12, "keeperPid": 7}),
            _entries({"piPid": True, "keeperPid": 7}, 3, None, {"piPid": 2.0, "keeperPid": 7}),
            _entries({"piPid": 2**31, "keeperPid": 7}, {"piPid": 3, "keeperPid": -7}),
            _entries({"piPid": 12, "keeperSockPath": "/x/pid 7"}, {"piPid": 3, "keeperPid": 9}),
            b'{"entries": {}}',
            b"[" * 300,
        ),
        (
            *(b'{"entries":[', b'"piPid":', b'"keeperSockPath":', b'"keeperPid":', b"]}"),
            *(b'"a.rpc.sock"', b"2147483647", b"1e3", b"\\ud800", b"null", b"true", b'"pid 7"'),
        ),
        longest=400,
        short=6_000,
    ),
    Target(
        "settings",
        pure(check_settings),
        (
            b'sessions_dir = "~/x"\nprograms = ["k"]\nresync = 5\n',
            b"[policy]\nsettle = 1.5\n[ladder]\nterm_grace = 86400\n",
            b'[policy]\nleftovers = "stop"\n',
            b'[log]\nlevel = "debug"\nform = "json"\n[write]\nattempts = 3\n',
            b"[write]\nbackoff = [0.05, 0]\n",
            b"resync = nan\n",
            b"resync = inf\n",
            b"resync = true\n",
            b"resync = 1979-05-27T07:32:00Z\n",
        ),
        (
            *(key.field.encode() for key in KEYS.values()),
            *(f"[{table}]\n".encode() for table in TABLES),
            *(b" = ", b'""', b"nan", b"-inf", b"1e400", b"0x", b"\\u0000", b"~"),
        ),
        longest=300,
    ),
    Target(
        "variable",
        pure(check_variable),
        (
            b"RESYNC=5",
            b"SESSIONS_DIR=~/x",
            b'PROGRAMS=["a", "b"]',
            b"WRITE_BACKOFF=[0.05, 1e-3]",
            b"LOG_LEVEL=debug",
            b"RESINK=5",
            b"AGENT_COMMAND=[[[[",
            b"POLICY_SETTLE=\xff",
        ),
        (
            *(key.variable.removeprefix(PREFIX).encode() + b"=" for key in KEYS.values()),
            *(b"nan", b"-inf", b"1e400", b"0x", b"\\u0000", b'["', b'"]', b"\xed\xa0\x80"),
        ),
        longest=100,
    ),
    Target(
        "process-name",
        process_names,
        (b"pi", b"a) Z 1 1", b"((()", b")", b") S 1\n", b"\n\n", b"\xff\xfe", b"a b c"),
        (b") ", b"(", b" Z ", b"\n"),
        longest=20,
    ),
)
