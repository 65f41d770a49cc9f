"""The service under a real ``systemd --user``, in namespaces of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from conftest import until
from user_manager import SOURCE, UserManager, user_manager

pytestmark = pytest.mark.root

SHOW = "systemctl --user show pi-reconciler -P"
MORE = """[Service]
WatchdogSec=3s
RestartSec=100ms
StandardOutput=append:%h/out
StandardError=append:%h/err
"""
"""What the test adds: a watchdog that it can wait for, and a log that it can read."""


@pytest.fixture
def user() -> Iterator[UserManager]:
    with user_manager() as manager:
        yield manager


def said(user: UserManager, command: str) -> str:
    """What a command prints that must succeed."""
    code, text = user.run(command)
    assert code == 0, f"{command}: {text}"
    return text.strip()


def session(user: UserManager) -> list[str]:
    """The pids of its keeper and its agent, as their files say."""
    folder = user.home / ".pi/dashboard/sessions"
    paths = [folder / f"demo.rpc.sock.{name}" for name in ("pid", "pi-pid")]
    return [path.read_text() for path in paths if path.exists()]


def ready(user: UserManager) -> None:
    until(lambda: "demo  ready" in user.run("pi-reconciler ls")[1], "the session is ready")


def prepared(user: UserManager) -> None:
    """Have the sessions folder, and the drop-in of the test."""
    drop_in = user.home / ".config/systemd/user/pi-reconciler.service.d/test.conf"
    said(user, f"mkdir -p {drop_in.parent} && echo '{MORE}' > {drop_in}")
    said(user, "mkdir -p -m 700 ~/.pi ~/.pi/dashboard ~/.pi/dashboard/sessions")


def test_sessions_outlive_what_befalls_the_service(user: UserManager) -> None:
    prepared(user)
    assert user.run("pi-reconciler service status")[0] == 4, "it is not known yet"

    # Installed, and ready when `install` returns.
    said(user, "pi-reconciler service install")
    assert said(user, f"{SHOW} ActiveState") == "active"
    assert user.run("pi-reconciler service status")[0] == 0
    main = said(user, f"{SHOW} MainPID")

    # A session that the service itself has started again is in its cgroup, and has neither the
    # service's socket nor its limit.
    told = "ulimit -Sn > ~/limit-$$; env > ~/env-$$; exec cat"
    said(user, f"pi-reconciler spawn demo --restart always -- sh -c '{told}'")
    first = session(user)
    said(user, f"kill -KILL {first[0]}")
    until(lambda: session(user) not in ([], first), "another keeper runs")
    ready(user)
    again = session(user)
    assert not set(again) & set(first)
    group = said(user, f"cat /sys/fs/cgroup$({SHOW} ControlGroup)/cgroup.procs")
    assert {main, *again} <= set(group.split())
    limit, environment = user.home / f"limit-{again[1]}", user.home / f"env-{again[1]}"
    until(lambda: environment.exists() and environment.read_text(), "its agent runs")
    assert limit.read_text().strip() == said(user, f"{SHOW} LimitNOFILESoft")
    assert not re.search("NOTIFY|WATCHDOG", environment.read_text())
    until(lambda: said(user, f"{SHOW} StatusText").startswith("1 ready"), "the status is told")

    # Installed again: the same unit, and the program that is there now; the same session.
    said(user, "pi-reconciler service install")
    before, main = main, said(user, f"{SHOW} MainPID")
    assert main not in {before, "0"}
    ready(user)
    told = json.loads(said(user, "pi-reconciler service status --json"))
    asked = json.loads(said(user, "pi-reconciler status --json"))
    assert {key: told[key] for key in ("state", "reason", "pid")} == {
        key: asked[key] for key in ("state", "reason", "pid")
    }
    assert told["uptime_s"] > 0
    assert set(told) - {"manager"} <= set(asked)

    # New settings are taken.
    said(user, "systemctl --user reload pi-reconciler")
    until(lambda: '"settings.reloaded"' in (user.home / "out").read_text(), "they are taken")
    assert said(user, f"{SHOW} ActiveState") == "active"
    assert said(user, f"{SHOW} MainPID") == main

    # Started again: another process, the same session.
    said(user, "systemctl --user restart pi-reconciler")
    restarted = said(user, f"{SHOW} MainPID")
    assert restarted != main
    ready(user)

    # Stuck: the watchdog ends it, and it is started again.
    said(user, f"kill -STOP {restarted}")
    until(lambda: said(user, f"{SHOW} MainPID") not in {restarted, "0"}, "another one runs")
    until(lambda: said(user, f"{SHOW} ActiveState") == "active", "it is ready")
    assert said(user, f"{SHOW} NRestarts") == "1"
    assert "most recent call first" in (user.home / "err").read_text(), "where it stood"
    ready(user)

    # Stopped: the session lives on in the cgroup.
    said(user, "systemctl --user stop pi-reconciler")
    assert user.run("pi-reconciler service status")[0] == 3
    assert session(user) == again
    ready(user)


def test_a_hardened_one_does_its_work_and_goes(user: UserManager) -> None:
    prepared(user)
    said(user, "pi-reconciler service install --hardened")
    said(user, "pi-reconciler spawn demo -- cat")
    until(lambda: "1 ready" in said(user, f"{SHOW} StatusText"), "it knows the session")
    status = said(user, f"cat /proc/$({SHOW} MainPID)/status")
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    said(user, f"kill -KILL {session(user)[0]}")
    until(lambda: not session(user), "its files are gone")
    until(lambda: '"session.cleaned"' in (user.home / "out").read_text(), "it is told")

    said(user, "pi-reconciler service uninstall")
    assert user.run("pi-reconciler service status")[0] == 4
    assert user.run("systemctl --user cat pi-reconciler")[0] != 0


def test_why_hardening_is_not_the_default(user: UserManager) -> None:
    """What makes code as it runs, as Node does, fails below it."""
    code = "import mmap; mmap.mmap(-1, 4096, prot=7)"  # to be read, written and executed
    (user.home / "jit.py").write_text(code)
    units = user.home / ".config/systemd/user"
    unit = "[Service]\nType=oneshot\nExecStart=python3 %h/jit.py\n"
    said(user, f"mkdir -p {units}/jit.service.d && echo '{unit}' > {units}/jit.service")
    said(user, "systemctl --user daemon-reload && systemctl --user start jit")
    hardened = f"{SOURCE}/reconciler/units/hardened.conf"
    said(user, f"cp {hardened} {units}/jit.service.d/ && systemctl --user daemon-reload")
    assert user.run("systemctl --user start jit")[0] != 0
    assert said(user, "systemctl --user show jit -P Result") == "exit-code"
