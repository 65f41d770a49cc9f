"""Fuzz what reads outside bytes: ``python -m fuzzing [TARGET...] [--runs N] [--seconds S]``.

With atheris (``make fuzz``) inputs are guided by the coverage of our code. One row a target;
the input that broke a rule is shown as a Python literal, to be added to the target's seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fuzzing.every import TARGETS
from fuzzing.target import Target


@dataclass(frozen=True, slots=True)
class Round:
    """What came of fuzzing one target."""

    runs: int
    corpus: str
    features: str
    violation: str
    """The input and what it broke, or nothing."""
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET", help="all when none is named")
    parser.add_argument("--runs", type=int, help="executions of each; else each target's own")
    parser.add_argument("--seconds", type=int, default=0, help="at most, for each; 0: no limit")
    parser.add_argument("--seed", type=int, default=1, help="of chance; 0: another one each time")
    given = parser.parse_args()
    if unknown := set(given.names) - TARGETS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    if importlib.util.find_spec("atheris") is None:
        parser.exit(2, "atheris is not here: make fuzz installs it, on Linux with CPython\n")
    row = "{:<14} {:>12} {:>8} {:>9} {:>10} {:>8}".format
    print(row("target", "executions", "corpus", "features", "violations", "seconds"))
    broken = []
    for name in given.names or TARGETS:
        target = TARGETS[name]
        runs = target.runs if given.runs is None else given.runs
        done = fuzz(target, runs, given.seconds, given.seed)
        figures = f"{done.runs:,}", done.corpus, done.features, int(bool(done.violation))
        print(row(name, *figures, f"{done.seconds:.0f}"), flush=True)
        broken += [f"{name}: {done.violation}"] if done.violation else []
    print(*broken, sep="\n", end="")
    return 1 if broken else 0


def fuzz(target: Target, runs: int, seconds: int, seed: int) -> Round:
    """Run one target under atheris, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="pi-fuzz-") as place:
        corpus, found = Path(place, "corpus"), Path(place, "found-")
        corpus.mkdir()
        for number, text in enumerate(target.seeds):
            corpus.joinpath(f"seed-{number}").write_bytes(text)
        words = Path(place, "words")
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        start = time.monotonic()
        command = (
            *(sys.executable, "-m", "fuzzing.engine", target.name, str(corpus)),
            *(f"-runs={runs}", f"-max_total_time={seconds}", f"-max_len={target.longest}"),
            *(f"-seed={seed}", f"-dict={words}", f"-artifact_prefix={found}"),
            *("-print_final_stats=1", "-timeout=20", "-rss_limit_mb=4096", "-verbosity=1"),
        )
        environment = os.environ | {"TMPDIR": place}
        ran = subprocess.run(command, env=environment, capture_output=True, check=False)
        said = ran.stderr.decode(errors="replace")
        violation = _violation(ran, Path(place)) if ran.returncode else ""
    return Round(
        runs=int(_last(r"number_of_executed_units: (\d+)", said) or 0),
        corpus=_last(r" corp: (\d+)", said),
        features=_last(r" ft: (\d+)", said),
        violation=violation,
        seconds=time.monotonic() - start,
    )


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _last(pattern: str, text: str) -> str:
    found: list[str] = re.findall(pattern, text)
    return found[-1] if found else ""


def _violation(ran: subprocess.CompletedProcess[bytes], place: Path) -> str:
    inputs = [path.read_bytes() for path in sorted(place.glob("found-*"))]
    output = (ran.stdout + ran.stderr).decode(errors="replace")
    _, _, told = output.partition("Uncaught Python exception")
    told = (told or output[-3000:]).partition("==")[0].strip(" =:\n")
    return "\n".join([*(f"input {text!r}" for text in inputs), f"exit {ran.returncode}", told, ""])


if __name__ == "__main__":
    sys.exit(main())
