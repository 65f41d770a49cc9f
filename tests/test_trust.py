from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import as_nobody, root
from stand_ins import NOBODY

from reconciler import trust
from reconciler.folder import Folder
from reconciler.trust import Trust, distrust_at

ANYBODY = 4711
"""A user or group that is not us, and need not exist."""


@pytest.fixture
def opened(folder: Path) -> Iterator[Folder]:
    with Folder(folder) as opened:
        yield opened


CLOSED = {
    0o700: "",
    0o755: "",
    0o2750: "",
    0o775: "its group or those whom its access list names may write to the folder (mode 0775): "
    "chmod g-w it",
    0o720: "its group or those whom its access list names may write to the folder (mode 0720): "
    "chmod g-w it",
    0o777: "everybody may write to the folder (mode 0777): chmod go-w it",
    0o1777: "everybody may write to the folder (mode 1777): chmod go-w it",
    0o702: "everybody may write to the folder (mode 0702): chmod go-w it",
}


@pytest.mark.parametrize("mode", CLOSED, ids=oct)
def test_the_folder_must_be_closed_to_others_writing(opened: Folder, mode: int) -> None:
    opened.path.chmod(mode)
    assert opened.distrust() == CLOSED[mode] == distrust_at(opened.path)


ABOVE = {
    0o711: "",
    0o755: "",
    0o1777: "",
    0o1770: "",
    0o775: "is open to writing by its group or those whom its access list names (mode 0775): "
    "chmod g-w it",
    0o777: "is open to writing by everybody (mode 0777): chmod go-w it",
}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mode", ABOVE, ids=oct)
def test_so_must_be_those_above_it_unless_they_are_sticky(
    opened: Folder, mode: int, steps: int
) -> None:
    above = opened.path.parents[steps - 1]
    above.chmod(mode)
    why = ABOVE[mode]
    assert opened.distrust() == (f"{str(above)!r}, above the folder, {why}" if why else "")


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_message_names_a_change_that_mends(opened: Folder, mode: int) -> None:
    opened.path.chmod(mode)
    opened.path.parent.chmod(mode | 0o070)
    while reason := opened.distrust():
        change = reason.rpartition("chmod ")[2].removesuffix(" it")
        wrong = opened.path.parent if "above" in reason else opened.path
        subprocess.run(["chmod", change, wrong], check=True)
    for path in (opened.path, opened.path.parent):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_what_counts_is_where_the_folder_really_lies(tmp_path: Path) -> None:
    """A link in an open folder can be exchanged: then it leads to another folder, judged anew."""
    real, link = tmp_path / "real" / "sessions", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    with Folder(link) as opened:
        assert opened.distrust() == ""
        real.parent.chmod(0o777)
        assert repr(str(real.parent)) in opened.distrust()


@root
@pytest.mark.root
def test_a_folder_of_another_user_is_not_trusted(opened: Folder) -> None:
    os.chown(opened.path, NOBODY, NOBODY)
    assert opened.distrust() == "the folder belongs to uid 65534, not to us (uid 0)"


@root
@pytest.mark.root
def test_nor_is_one_below_another_users(opened: Folder) -> None:
    above = opened.path.parents[1]
    os.chown(above, NOBODY, NOBODY)
    text = f"{str(above)!r}, above the folder, belongs to uid 65534, who can exchange the folder"
    assert opened.distrust() == text


@pytest.fixture
def of_nobody() -> Iterator[Folder]:
    """A folder of another user below one of root's, as home folders are."""
    above = Path(tempfile.mkdtemp(prefix="pi-"))
    above.chmod(0o755)
    folder = above / "sessions"
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    with Folder(folder) as opened:
        yield opened
    shutil.rmtree(above)


@root
@pytest.mark.root
def test_a_user_trusts_what_is_below_roots_folders(of_nobody: Folder) -> None:
    with as_nobody():
        assert of_nobody.distrust() == ""
    of_nobody.path.parent.chmod(0o775)
    with as_nobody():
        assert "above the folder" in of_nobody.distrust()


@root
@pytest.mark.root
def test_a_user_trusts_them_where_root_has_no_number(of_nobody: Folder) -> None:
    """In a user namespace, as of a container: what is root's looks like some other user's."""
    reading, writing = os.pipe()
    waits, goes_on = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            denied = ctypes.CDLL(None).unshare(0x10000000)  # CLONE_NEWUSER
            os.write(writing, b"no" if denied else b"ok")
            os.read(waits, 1)
            seen = (os.geteuid(), os.stat("/").st_uid, of_nobody.distrust())
            os.write(writing, repr(seen).encode())
        finally:
            os._exit(0)
    try:
        os.close(writing)
        if os.read(reading, 2) == b"no":
            pytest.skip("no user namespaces here")
        Path(f"/proc/{child}/uid_map").write_text(f"{ANYBODY} {NOBODY} 1")
        os.write(goes_on, b".")
        assert os.read(reading, 4096).decode() == repr((ANYBODY, NOBODY, ""))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for descriptor in (reading, waits, goes_on):
            os.close(descriptor)


# Access lists.

USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20


def access_list(path: Path, *, named: int, mask: int) -> None:
    """Set a POSIX access list that names one user, as ``setfacl`` does."""
    entries = [(USER_OBJ, 7, -1), (USER, named, ANYBODY), (GROUP_OBJ, 0, -1)]
    entries += [(MASK, mask, -1), (OTHER, 0, -1)]
    packed = (struct.pack("<HHI", tag, allowed, who & 0xFFFFFFFF) for tag, allowed, who in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(packed))
    except OSError as error:
        if error.errno not in {errno.ENOTSUP, errno.EINVAL}:
            raise
        pytest.skip("this filesystem has no access lists")


def test_an_access_list_that_lets_somebody_write_is_not_trusted(opened: Folder) -> None:
    access_list(opened.path, named=7, mask=7)
    reason = opened.distrust()
    assert "access list names may write to the folder (mode 0770): chmod g-w it" in reason
    subprocess.run(["chmod", "g-w", opened.path], check=True)
    assert opened.distrust() == ""


def test_an_access_list_whose_mask_forbids_writing_is_trusted(opened: Folder) -> None:
    access_list(opened.path, named=7, mask=5)
    assert opened.distrust() == ""


@root
@pytest.mark.root
@pytest.mark.parametrize("mask", [5, 7])
def test_the_mask_says_what_the_kernel_lets_others_do(folder: Path, mask: int) -> None:
    """What the verdict on access lists stands on, asked of the kernel."""
    access_list(folder, named=7, mask=mask)
    become = f"os.setresuid({ANYBODY}, {ANYBODY}, {ANYBODY})"
    code = f"import os; {become}; print(os.access('.', os.W_OK))"
    ran = subprocess.run(
        ["python3", "-I", "-S", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str(mask == 7)


# Asked often.


def test_asked_often_the_folder_itself_is_looked_at_each_time(opened: Folder) -> None:
    often = Trust()
    for mode, trusted in ((0o700, True), (0o770, False), (0o700, True), (0o707, False)):
        opened.path.chmod(mode)
        assert (often.distrust(opened.fd, opened.path) == "") is trusted


def test_asked_often_those_above_are_looked_at_again_after_a_second(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    often = Trust()
    assert often.distrust(opened.fd, opened.path) == ""
    opened.path.parent.chmod(0o777)
    assert often.distrust(opened.fd, opened.path) == ""
    now += 1.0
    assert "above the folder" in often.distrust(opened.fd, opened.path)
    opened.path.parent.chmod(0o755)
    assert often.distrust(opened.fd, opened.path) == ""


def test_asked_often_another_folder_is_another(opened: Folder, tmp_path: Path) -> None:
    often = Trust()
    assert often.distrust(opened.fd, opened.path) == ""
    (tmp_path / "open" / "sessions").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    with Folder(tmp_path / "open" / "sessions") as other:
        assert "above the folder" in often.distrust(other.fd, other.path)


def test_what_cannot_be_looked_at_is_not_trusted(
    opened: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int) -> Iterator[tuple[str, os.stat_result]]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(trust, "_above", refused)
    assert opened.distrust() == "the folders above it cannot be looked at (Permission denied)"
