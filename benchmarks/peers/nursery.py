"""Light stand-ins for live keepers, thousands of them: ``nursery.py FOLDER PROGRAM COUNT``.

Each is what a keeper of another make is to the reconciler, by every proof that it asks for: its
arguments are a runtime, ``keeper.cjs`` and the session's id; it holds the folder open; it
listens on the session's socket, and its pid stands in the pid file; its agent is its child and
dies with it. It is a shell that waits, so it takes some hundred KiB where a keeper takes MiB.

All of them end when this process does, however it ends: their input ends with it.
Run with ``python -I -S``; the standard library only.
"""

import ctypes
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

folder, program, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
libc = ctypes.CDLL(None)
libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is reaped at once
os.chdir(folder)
held = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
os.set_inheritable(held, True)
theirs, ours = os.pipe()
os.dup2(theirs, 0)


def write(name: str, pid: int) -> None:
    with open(name, "w") as file:
        file.write(str(pid))


def keeper(sid: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    listener = socket.socket(socket.AF_UNIX)
    listener.set_inheritable(True)
    listener.bind(f"{sid}.rpc.sock")
    listener.listen()
    write(f"{sid}.rpc.sock.pid", os.getpid())
    agent = os.fork()
    if not agent:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        listener.close()
        os.close(held)
        os.execv("/bin/sleep", ["sleep", "infinity"])  # noqa: S606 - it is to be no shell's child
    write(f"{sid}.rpc.sock.pi-pid", agent)
    os.execv("/bin/sh", ["sh", program, sid])  # noqa: S606 - its pid is to stay what it is


for number in range(count):
    if not os.fork():
        try:
            keeper(f"live-{number:04}")
        finally:
            os._exit(1)
print("ready", flush=True)
signal.pause()
