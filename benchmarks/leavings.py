"""What dead keepers leave: made without them, as it lies on the disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from benchmarks.processes import pid_file_of, socket_of

_FIRST = 300
# Where the kernel begins again once all pids were given out.


def dead_pids(count: int) -> list[int]:
    """Numbers that are nobody's, and will be so the longest: those given out before the newest."""
    newest = int(Path("/proc/loadavg").read_text().split()[-1])
    limit = int(Path("/proc/sys/kernel/pid_max").read_text())
    used = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    found: list[int] = []
    for back in range(1, limit - _FIRST):
        pid = (newest - back - _FIRST) % (limit - _FIRST) + _FIRST
        if pid not in used and not _exists(pid):
            found.append(pid)
            if len(found) == count:
                return found
    raise RuntimeError(f"there are no {count} free pids")


def _exists(pid: int) -> bool:
    """Whether it is anybody's: the number of a thread, too."""
    return os.path.lexists(f"/proc/{pid}")


def leave(folder: Path, sid: str, pid: int) -> tuple[str, str]:
    """A socket that nobody listens on, and a pid file; gives their names."""
    socket, pid_file = str(socket_of(folder, sid)), str(pid_file_of(folder, sid))
    os.mknod(socket, stat.S_IFSOCK | 0o600)
    with open(pid_file, "w") as file:
        file.write(str(pid))
    return socket, pid_file
