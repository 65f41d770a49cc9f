"""Run a program and kill it at one system call: ``kill_at.py SIDE NUMBER REPORT COMMAND...``.

Counted are the calls that change something of a folder held by descriptor, or of another
process: the entry's removal, renaming, linking or making, what is written into what was so
made, signals, locks. At call NUMBER the program gets a real SIGKILL: ``before`` the kernel
carries it out (then it is never carried out) or ``after``. REPORT gets a line for each
counted call. The exit code is the program's, or 137.

A seccomp filter stops the program at these calls alone, for ptrace: between them it runs as
it would by itself. Everything happens in the kernel's own order; nothing of the program is
replaced.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys
from typing import Final, TextIO

KILLED: Final = 137

# From the kernel's tables of system calls.
CALLS: Final = {
    "x86_64": {
        "write": 1,
        "kill": 62,
        "flock": 73,
        "openat": 257,
        "unlinkat": 263,
        "renameat": 264,
        "linkat": 265,
        "renameat2": 316,
        "pidfd_send_signal": 424,
    },
    "aarch64": {
        "write": 64,
        "kill": 129,
        "flock": 32,
        "openat": 56,
        "unlinkat": 35,
        "renameat": 38,
        "linkat": 37,
        "renameat2": 276,
        "pidfd_send_signal": 424,
    },
}
_BY_PATH = {"openat", "unlinkat", "renameat", "linkat", "renameat2"}
_AT_FDCWD = 0xFFFFFF9C

# linux/ptrace.h, linux/seccomp.h, linux/filter.h, linux/wait.h
_CONT, _SYSCALL, _SEIZE, _GET_SYSCALL_INFO = 7, 24, 0x4206, 0x420E
_SYSGOOD, _CLONE, _EXEC, _TRACE_SECCOMP, _EXITKILL = 1, 1 << 3, 1 << 4, 1 << 7, 1 << 20
_EVENT_SECCOMP = 7
_SET_SECCOMP, _NO_NEW_PRIVS, _FILTER = 22, 38, 2
_ALLOW, _TRACE = 0x7FFF0000, 0x7FF00000
_LOAD, _JUMP_IF, _RETURN = 0x20, 0x15, 0x06
_WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _ptrace(request: int, pid: int, address: int = 0, value: int = 0) -> None:
    _checked(_libc.ptrace(request, pid, address, value))


def _install_filter(numbers: list[int]) -> None:
    """From now on this process stops at these calls, and at no others."""
    step = struct.Struct("=HBBI")
    steps = [step.pack(_LOAD, 0, 0, 0)]
    steps += [step.pack(_JUMP_IF, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    steps += [step.pack(_RETURN, 0, 0, _ALLOW), step.pack(_RETURN, 0, 0, _TRACE)]
    text = ctypes.create_string_buffer(b"".join(steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(text))
    _checked(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_libc.prctl(_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(program)))


class Killer:
    """Follows the program from call to call, and kills it at one of them."""

    def __init__(self, pid: int, side: str, number: int, report: TextIO) -> None:
        self._pid = pid
        self._side = side
        self._left = number
        self._report = report
        self._names = {number: name for name, number in CALLS[platform.machine()].items()}
        self._made: set[int] = set()
        self._opening: set[int] = set()

    def follow(self) -> int:
        """Until the end of the program; its exit code."""
        while True:
            tid, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                self._go_on(tid, status)
            elif tid == self._pid:
                return KILLED if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)

    def _go_on(self, tid: int, status: int) -> None:
        event, number = status >> 16, os.WSTOPSIG(status)
        try:
            if event == _EVENT_SECCOMP:
                self._enters(tid)
            elif number == signal.SIGTRAP | 0x80:
                self._leaves(tid)
            else:  # a thread begins, a program is executed; or a signal, which is passed on
                _ptrace(_CONT, tid, 0, 0 if event else number)
        except ProcessLookupError:  # it was killed meanwhile
            return

    def _enters(self, tid: int) -> None:
        number, *arguments = self._call(tid, "=7Q")
        name = self._names[number]
        if not self._counts(name, arguments):
            _ptrace(_CONT, tid)
            return
        self._left -= 1
        path = _text(tid, arguments[1]) if name in _BY_PATH else str(arguments[0])
        self._report.write(f"{name} {path}\n")
        self._report.flush()
        if name == "openat":
            self._opening.add(tid)
        if self._left == 0 and self._side == "before":
            self._kill()
        _ptrace(_SYSCALL, tid)  # the next stop is the call's end

    def _counts(self, name: str, arguments: list[int]) -> bool:
        if name == "write":
            return arguments[0] in self._made
        if name == "openat" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
        return name not in _BY_PATH or arguments[0] & 0xFFFFFFFF != _AT_FDCWD

    def _leaves(self, tid: int) -> None:
        (result,) = self._call(tid, "=q")
        if tid in self._opening:
            self._opening.discard(tid)
            self._made.add(result)
        if self._left == 0 and self._side == "after":
            self._kill()
        _ptrace(_CONT, tid)

    def _kill(self) -> None:
        self._left = -1
        os.kill(self._pid, signal.SIGKILL)

    def _call(self, tid: int, form: str) -> tuple[int, ...]:
        """What the kernel says of the call that a thread stands at.

        When it enters: the call's number and its arguments; when it leaves: the result.
        """
        info = ctypes.create_string_buffer(128)
        _ptrace(_GET_SYSCALL_INFO, tid, len(info), ctypes.addressof(info))
        return struct.unpack_from(form, info, 24)


def _text(tid: int, address: int) -> str:
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), 256, address).split(b"\0")[0].decode(errors="replace")


def main(side: str, number: str, report: str, *command: str) -> int:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)  # until it is followed
        _install_filter(list(CALLS[platform.machine()].values()))
        os.execv(command[0], command)  # noqa: S606 - as it would be run without us
    options = _SYSGOOD | _CLONE | _EXEC | _TRACE_SECCOMP | _EXITKILL
    _ptrace(_SEIZE, pid, 0, options)
    os.write(write, b".")
    os.close(write)
    with open(report, "w", encoding="utf-8") as lines:
        return Killer(pid, side, int(number), lines).follow()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
