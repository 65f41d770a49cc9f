"""Names, arguments and ids: what strangers put into a folder, and onto a command line."""

from __future__ import annotations

import os
import string
from typing import NamedTuple

from fuzzing.target import Target, ViolationError, expect, pure
from reconciler import keeper_process
from reconciler.layout import (
    CLAIM,
    InvalidSessionIdError,
    ParsedName,
    Role,
    check_sid,
    claims,
    file_name,
    keeper_arguments,
    parse_name,
)
from reconciler.removal import is_taken

PLATFORMS = ("linux", "darwin", "win32")
PROGRAMS = frozenset({"keeper_process.py", "keeper.cjs"})
_FIRST = frozenset(string.ascii_letters + string.digits)
_REST = _FIRST | frozenset("._-")
_SIDS = (b"a", b"5f0e7c1e-0c50-4f0e-9b39-4e4a3a2f3d11", b"launch-a", b"a" * 90, b"a" * 91, b"x.log")
_NAME_WORDS = (
    *(b".rpc.sock", b".rpc.sock.pid", b".rpc.sock.pi-pid", b"pi-rpc-", b".pid", b".pi-pid"),
    *(b"keeper-", b"keeper-launch-", b"launch-", b".log", b".taken-", b"\n", b"\0", b"/"),
)


def is_sid(text: str) -> bool:
    """The rule for session ids, said without a regular expression."""
    return (
        1 <= len(text) <= 90
        and text[0] in _FIRST
        and _REST.issuperset(text)
        and not text.startswith("launch-")
    )


class _Form(NamedTuple):
    role: Role
    before: str
    after: str

    def sid(self, name: str) -> str | None:
        """What stands between, where the name has this form and that is a session id."""
        sid = name[len(self.before) : len(name) - len(self.after)]
        return sid if name == self.before + sid + self.after and is_sid(sid) else None


_FORMS = {
    platform: [
        _Form(role, *file_name(role, "\0", platform).split("\0"))
        for role in Role
        if (role, platform) != (Role.SOCKET, "win32")
    ]
    for platform in PLATFORMS
}


def _readings(name: str, platform: str) -> list[ParsedName]:
    """All that a name could mean, by trying each role's form on it."""
    return [
        ParsedName(form.role, sid)
        for form in _FORMS[platform]
        if (sid := form.sid(name)) is not None
    ]


def check_name(text: bytes) -> None:
    """A name means what one form says, or nothing; never two sessions; it can be written back."""
    name = os.fsdecode(text)
    for platform in PLATFORMS:
        readings = _readings(name, platform)
        parsed = parse_name(name, platform)
        if readings != ([parsed] if parsed else []):
            raise ViolationError(f"{name!r} was read as {parsed} on {platform}, not as {readings}")
        claimed = claims(name, platform)
        if claimed != (parsed.sid if parsed and parsed.role in CLAIM else None):
            raise ViolationError(f"{name!r} claims {claimed!r}, and is {parsed}")
        if parsed and file_name(parsed.role, check_sid(parsed.sid), platform) != name:
            raise ViolationError(f"{name!r} is not the name of {parsed}")


def check_session_id(text: bytes) -> None:
    """Reconciler and keeper take the same ids, and each makes names that are read back."""
    sid = os.fsdecode(text)
    try:
        taken = check_sid(sid) == sid
    except InvalidSessionIdError:
        taken = False
    expect(taken == is_sid(sid), f"{sid!r} was {'taken' if taken else 'refused'}")
    own = keeper_process.SESSION_ID.fullmatch(sid) is not None
    expect(own == taken, f"the keeper and the reconciler differ about {sid!r}")
    for platform in PLATFORMS if taken else ():
        for role in set(Role) - ({Role.SOCKET} if platform == "win32" else set()):
            name = file_name(role, sid, platform)
            expect(parse_name(name, platform) == ParsedName(role, sid), f"{name!r} is not {sid!r}")
            expect("/" not in name and len(os.fsencode(name)) < 128, f"{name!r} is no bare name")


def check_arguments(text: bytes) -> None:
    """A keeper is what runs a known program with a session id after it, and options before."""
    arguments = [os.fsdecode(part) for part in text.split(b"\0")]
    expected = None
    for at in range(len(arguments) - 1):
        if arguments[at].rpartition("/")[2] in PROGRAMS and is_sid(arguments[at + 1]):
            if {argument[:1] for argument in arguments[1:at]} <= {"-"}:
                expected = arguments[at].rpartition("/")[2], arguments[at + 1]
            break
    found = keeper_arguments(arguments, PROGRAMS, "linux")
    told = (found.program, found.sid) if found else None
    expect(told == expected, f"{arguments!r} were read as {told}, not {expected}")
    keeper_arguments(arguments, PROGRAMS, "win32")


def check_hidden(text: bytes) -> None:
    """A hidden name gives back the name and the remover that it was made of, or nothing."""
    name = os.fsdecode(text)
    front, mark, remover = name.rpartition(".taken-")
    digits = remover.isascii() and remover.isdigit() and len(remover) <= 10
    formed = bool(mark) and digits and name[:1] == "." and len(front) > 1 and "\n" not in front
    expect(is_taken(name) == formed, f"{name!r} is {'' if formed else 'not '}a hidden name")
    for sid in {name[:90]} if is_sid(name[:90]) else ():
        for role in CLAIM:
            original = file_name(role, sid, "linux")
            hidden = f".{original}.taken-{os.getpid()}"
            expect(is_taken(hidden), f"{hidden!r} is not known as hidden")
            expect(claims(hidden) is None, f"{hidden!r} claims a keeper")


_NAMES = tuple(
    os.fsencode(file_name(role, os.fsdecode(sid), platform))
    for sid in _SIDS
    for role in Role
    for platform in ("linux", "win32")
    if (role, platform) != (Role.SOCKET, "win32")
)

TARGETS = (
    Target("name", pure(check_name), _NAMES, _NAME_WORDS, longest=140),
    Target("session-id", pure(check_session_id), _SIDS, (b"launch-", b"\n", b"."), longest=100),
    Target(
        "arguments",
        pure(check_arguments),
        (
            b"python3\0-I\0-S\0/opt/keeper_process.py\0a",
            b"node\0keeper.cjs\0a",
            b"timeout\x001d\0node\0keeper.cjs\0a",
            b"keeper.cjs\0launch-a\0keeper.cjs\0b",
            b"vi\0keeper.cjs",
        ),
        (b"keeper.cjs", b"keeper_process.py", b"\0", b"/", b"-", b"--", b"launch-", b"\\"),
    ),
    Target(
        "hidden",
        pure(check_hidden),
        (b".a.rpc.sock.taken-1", b".a.rpc.sock.pid.taken-4194304", b".a.taken-1.taken-2", b"a"),
        (*_NAME_WORDS, b".taken-1"),
        longest=140,
    ),
)
