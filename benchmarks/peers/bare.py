"""The limit: the same work in a bare loop, with nothing around it. It checks nothing.

``bare.py deaths``: each line on its standard input is a pid, and the files that go when that
process dies; it is answered once the process is held. One epoll, one pidfd each.

``bare.py drops FOLDER``: when a pid file appears, it and the socket beside it go.

``bare.py drain SOCKET``: reads all that comes, closes its side at the end of it, and says how
many bytes it was.

Run with ``python -I -S``; the standard library only.
"""

import ctypes
import os
import resource
import select
import socket
import struct
import sys

IN_CLOSE_WRITE, IN_MOVED_TO = 0x8, 0x80
HEADER = struct.calcsize("iIII")


def deaths() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    epoll = select.epoll()
    epoll.register(0, select.EPOLLIN)
    files: dict[int, list[bytes]] = {}
    print("ready", flush=True)
    while True:
        for descriptor, _ in epoll.poll():
            if descriptor in files:
                for path in files.pop(descriptor):
                    os.unlink(path)
                epoll.unregister(descriptor)
                os.close(descriptor)
            else:
                pid, *paths = os.read(0, 4096).split()
                pidfd = os.pidfd_open(int(pid))
                files[pidfd] = paths
                epoll.register(pidfd, select.EPOLLIN)
                print("held", flush=True)


def drops(folder: str) -> None:
    libc = ctypes.CDLL(None)
    inotify = libc.inotify_init1(0)
    libc.inotify_add_watch(inotify, os.fsencode(folder), IN_CLOSE_WRITE | IN_MOVED_TO)
    os.chdir(folder)
    print("ready", flush=True)
    while True:
        notices = os.read(inotify, 65536)
        at = 0
        while at < len(notices):
            *_, size = struct.unpack_from("iIII", notices, at)
            name = notices[at + HEADER : at + HEADER + size].rstrip(b"\0")
            at += HEADER + size
            if name.endswith(b".pid"):
                os.unlink(name[:-4])
                os.unlink(name)


def drain(path: str) -> None:
    buffer = bytearray(1 << 18)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            taken = 0
            with client:
                while count := client.recv_into(buffer):
                    taken += count
            print(taken, flush=True)


match sys.argv[1:]:
    case ["deaths"]:
        deaths()
    case ["drops", place]:
        drops(place)
    case ["drain", place]:
        drain(place)
