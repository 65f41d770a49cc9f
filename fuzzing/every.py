"""All targets, by name."""

from __future__ import annotations

from collections.abc import Mapping

from fuzzing import files, names, wire
from fuzzing.target import Target

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (*names.TARGETS, *files.TARGETS, *wire.TARGETS)
}
