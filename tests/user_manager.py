"""A real ``systemd --user``, in namespaces of its own: for one test, and gone with it.

It needs root, to make the namespaces, and a cgroup2 hierarchy that can be mounted. Nothing of it
is seen outside: mounts, processes and the cgroup's root are its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import WAIT, until

UID = 4242
"""A user without a name, and without any right that root has."""

SOURCE = Path(__file__).parent.parent
CGROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
END = "--- end of output, exit code"

INSIDE = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system {runtime}
{opened}
mount -t tmpfs -o mode=700,uid={uid} tmpfs {runtime}
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir /sys/fs/cgroup/user.slice
chown -R {uid} /sys/fs/cgroup/user.slice
echo $$ > /sys/fs/cgroup/user.slice/cgroup.procs
exec setpriv --reuid={uid} --regid={uid} --clear-groups env -i HOME={home} PATH={path} \
  PYTHONPATH={source} XDG_RUNTIME_DIR={runtime} LC_ALL=C bash -c '
    /lib/systemd/systemd --user --unit=basic.target > {home}/manager.log 2>&1 &
    exec bash'
"""


class UserManager:
    """A shell of a user whose service manager runs."""

    def __init__(self, home: Path, cgroup: Path) -> None:
        self.home = home
        paths = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        script = INSIDE.format(
            uid=UID,
            home=home,
            runtime=f"/run/user/{UID}",
            opened="\n".join(opened(Path(sys.base_prefix), SOURCE)),
            path=paths,
            source=SOURCE,
        )
        (home / "inside.sh").write_text(script)
        join = f"echo $$ > {cgroup}/cgroup.procs && exec unshare --mount --cgroup --pid --fork "
        join += f"--propagation private --kill-child bash {home}/inside.sh"
        self._shell = subprocess.Popen(
            ["bash", "-c", join],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def await_start(self) -> None:
        """Wait until it runs; where the system does not let it, the test is skipped."""
        deadline = time.monotonic() + WAIT
        while "running" not in (said := self.run("systemctl --user is-system-running")[1]):
            if time.monotonic() > deadline:
                log = (self.home / "manager.log").read_text()
                pytest.skip(f"no systemd --user can be had here: {said} {log}")
            time.sleep(0.05)

    def run(self, command: str) -> tuple[int, str]:
        """Run a command as the user; its exit code, and what it printed."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(
                f"{{ {command}\n}} </dev/null 2>&1\nprintf '\\n%s %s\\n' '{END}' $?\n"
            )
            self._shell.stdin.flush()
        said: list[str] = []
        for line in self._shell.stdout:
            if line.startswith(END):
                return int(line.split()[-1]), "".join(said)
            said.append(line)
        pytest.skip(f"no systemd --user can be had here: {''.join(said)}")

    def close(self) -> None:
        """End all that runs in it."""
        self._shell.kill()  # with --kill-child, and the first process of a pid namespace is all
        self._shell.communicate()


@contextlib.contextmanager
def user_manager() -> Iterator[UserManager]:
    """A manager, or a skipped test where there can be none."""
    if os.geteuid() != 0 or not Path("/lib/systemd/systemd").exists():
        pytest.skip("needs root and systemd")
    parent = next((path for path in CGROUPS if (path / "cgroup.procs").exists()), None)
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("needs a cgroup2 hierarchy")
    home = Path(tempfile.mkdtemp(prefix="pi-"))
    os.chown(home, UID, UID)
    cgroup = parent / home.name
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"needs a cgroup of its own: {error}")
    manager = UserManager(home, cgroup)
    try:
        manager.await_start()
        yield manager
    finally:
        manager.close()
        until(lambda: _removed(cgroup), "its cgroups are empty")
        shutil.rmtree(home)


def opened(*needed: Path) -> Iterator[str]:
    """Commands that make folders reachable for any user, in a mount namespace of its own."""
    for number, path in enumerate(needed):
        yield f"mkdir /run/needed{number}; mount --bind {path} /run/needed{number}"
    for closed in {top for path in needed if (top := closed_above(path))}:
        yield f"mount -t tmpfs -o mode=755 tmpfs {closed}"
    for number, path in enumerate(needed):
        if closed_above(path):
            yield f"mkdir -p {path}; mount --bind /run/needed{number} {path}"


def closed_above(path: Path) -> Path | None:
    """The topmost folder on the way that others may not pass."""
    ways = (*reversed(path.parents), path)
    return next((each for each in ways if not each.stat().st_mode & stat.S_IXOTH), None)


def _removed(cgroup: Path) -> bool:
    try:
        for path, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(path)
    except OSError:
        return False
    return True
