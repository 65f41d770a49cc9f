"""Where the background process answers over HTTP: the settings, and how an address is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from reconciler.ranges import Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSettings:
    """Where metrics and health are to be had.

    Attributes:
        address: ``HOST:PORT``, see `host_and_port`; empty: nowhere.
        public: that may be an address which other machines reach.
    """

    address: Annotated[str, Pattern("^$|^[^\0]+:[0-9]{1,5}$", "HOST:PORT, or nothing")] = ""
    public: bool = False


def host_and_port(text: str) -> tuple[str, int]:
    """``HOST:PORT``, split; an IPv6 address may stand in brackets.

    Raises:
        ValueError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port[:6]) >= 1 << 16:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)
