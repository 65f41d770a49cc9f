"""Keeps the keepers of headless pi sessions right.

Async first: `KeeperManager` spawns, stops and finds sessions, `RpcWriter` delivers lines
to them, `Reconciler` runs the loop that keeps a sessions folder right. `reconciler.sync`
is the same for plain scripts, `reconciler.testing` offers keepers to test against.

A name is imported when it is first used, so ``import reconciler`` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reconciler.agents import AgentProbe as AgentProbe
    from reconciler.controller import Reconciler as Reconciler
    from reconciler.errors import AgentExitedError as AgentExitedError
    from reconciler.errors import AgentNotFoundError as AgentNotFoundError
    from reconciler.errors import AlreadyRunningError as AlreadyRunningError
    from reconciler.errors import FolderError as FolderError
    from reconciler.errors import FolderLockedError as FolderLockedError
    from reconciler.errors import InvalidRequestError as InvalidRequestError
    from reconciler.errors import KeeperStartError as KeeperStartError
    from reconciler.errors import NoSuchSessionError as NoSuchSessionError
    from reconciler.errors import NotKeptError as NotKeptError
    from reconciler.errors import ReconcilerError as ReconcilerError
    from reconciler.errors import StillAliveError as StillAliveError
    from reconciler.errors import UnverifiableError as UnverifiableError
    from reconciler.findings import Finding as Finding
    from reconciler.keeper import KeeperEntry as KeeperEntry
    from reconciler.keeper import KeeperManager as KeeperManager
    from reconciler.keeper import SpawnedKeeper as SpawnedKeeper
    from reconciler.ladder import Ladder as Ladder
    from reconciler.layout import InvalidSessionIdError as InvalidSessionIdError
    from reconciler.observations import Observation as Observation
    from reconciler.plans import Plan as Plan
    from reconciler.plans import Verdict as Verdict
    from reconciler.restarts import RestartLimits as RestartLimits
    from reconciler.rpc_writer import Attempt as Attempt
    from reconciler.rpc_writer import Delivery as Delivery
    from reconciler.rpc_writer import InvalidMessageError as InvalidMessageError
    from reconciler.rpc_writer import ManyDelivery as ManyDelivery
    from reconciler.rpc_writer import Message as Message
    from reconciler.rpc_writer import Outcome as Outcome
    from reconciler.rpc_writer import Reason as Reason
    from reconciler.rpc_writer import RpcStream as RpcStream
    from reconciler.rpc_writer import RpcWriter as RpcWriter
    from reconciler.rpc_writer import StreamBrokenError as StreamBrokenError
    from reconciler.rpc_writer import WritePolicy as WritePolicy
    from reconciler.sessions import Session as Session
    from reconciler.sessions import SessionTable as SessionTable
    from reconciler.state import Desired as Desired
    from reconciler.state import Policy as Policy
    from reconciler.stopping import StoppedSession as StoppedSession

__version__ = "0.1.0"

_HOMES = {
    "agents": ("AgentProbe",),
    "controller": ("Reconciler",),
    "errors": (
        "AgentExitedError",
        "AgentNotFoundError",
        "AlreadyRunningError",
        "FolderError",
        "FolderLockedError",
        "InvalidRequestError",
        "KeeperStartError",
        "NoSuchSessionError",
        "NotKeptError",
        "ReconcilerError",
        "StillAliveError",
        "UnverifiableError",
    ),
    "findings": ("Finding",),
    "keeper": ("KeeperEntry", "KeeperManager", "SpawnedKeeper"),
    "ladder": ("Ladder",),
    "layout": ("InvalidSessionIdError",),
    "observations": ("Observation",),
    "plans": ("Plan", "Verdict"),
    "restarts": ("RestartLimits",),
    "rpc_writer": (
        "Attempt",
        "Delivery",
        "InvalidMessageError",
        "ManyDelivery",
        "Message",
        "Outcome",
        "Reason",
        "RpcStream",
        "RpcWriter",
        "StreamBrokenError",
        "WritePolicy",
    ),
    "sessions": ("Session", "SessionTable"),
    "state": ("Desired", "Policy"),
    "stopping": ("StoppedSession",),
}
_ROOM_OF = {name: room for room, names in _HOMES.items() for name in names}

__all__ = sorted(_ROOM_OF)  # noqa: PLE0605 - a list of strings, made from the table above


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if (room := _ROOM_OF.get(name)) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{room}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM_OF})
