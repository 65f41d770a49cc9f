"""The plain face for scripts without an event loop.

The same names as in the package, with the same arguments, results and errors; each call
returns when it is done. From a running event loop use the package's own classes.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from reconciler import keeper
from reconciler.rpc_writer import BlockingRpcWriter as RpcWriter

__all__ = ["KeeperManager", "RpcWriter"]

P = ParamSpec("P")
T = TypeVar("T")
_Async = Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]


def _blocking(method: _Async[P, T]) -> Callable[Concatenate[keeper.KeeperManager, P], T]:
    """The same method, run to its end in an event loop of its own."""

    @functools.wraps(method)
    def run(self: keeper.KeeperManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        _refuse_loop(method.__name__)
        return asyncio.run(method(self, *args, **kwargs))

    return run


def _refuse_loop(name: str) -> None:
    """A call that blocks would stop a running loop, and whatever it waits for there."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        f"an event loop is running: await reconciler.KeeperManager.{name}, "
        "or call this one from another thread"
    )


_spawn = _blocking(keeper.KeeperManager.spawn)
_stop = _blocking(keeper.KeeperManager.stop)
_restart = _blocking(keeper.KeeperManager.restart)
_discover = _blocking(keeper.KeeperManager.discover)


class KeeperManager(keeper.KeeperManager):
    """Starts, ends and finds keepers; see `reconciler.KeeperManager`."""

    spawn = _spawn  # type: ignore[assignment] # the same, and it blocks
    stop = _stop  # type: ignore[assignment] # the same, and it blocks
    restart = _restart  # type: ignore[assignment] # the same, and it blocks
    discover = _discover  # type: ignore[assignment] # the same, and it blocks
