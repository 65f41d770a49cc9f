"""The benchmarks' harness: that it measures, not what. No figure is judged here."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import stale_pair

from benchmarks import table
from benchmarks.__main__ import main
from benchmarks.events import storm
from benchmarks.every import ROWS, measure
from benchmarks.leavings import dead_pids
from benchmarks.measuring import Figure, Row, SkippedError, Stage, Values, p99, spread
from benchmarks.watching import IN_ATTRIB, IN_CREATE, Going, all_gone, notices

ROOT = Path(__file__).parent.parent
KEYS = {"ratio", "goal", "ours", "peer", "unit", "rounds", "spread", "better"}

ROW = Row(
    name="row",
    work="work",
    against="a peer",
    goal=0.5,
    unit="ms",
    scene=lambda _: {"ours": [1.0, 2.0, 3.0], "them": [4.0, 4.0, 100.0]},
    peer="them",
)


def figure(row: Row) -> Figure:
    found = measure((row,), quick=True)[row.name]
    assert isinstance(found, Figure)
    return found


def broken(_: Stage) -> Values:
    raise OSError("its peer has died")


def skipped(_: Stage) -> Values:
    raise SkippedError("no such peer here")


# The harness as it is run.


def test_some_rows_from_start_to_end(tmp_path: Path) -> None:
    names = ["mass_kill", "keeper_private", "drop_to_clean"]
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", *names, "--results", str(results)]
    page = table.PAGE.read_bytes()
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(results.read_text())
    assert sorted(found) == sorted(names)
    for name, result in found.items():
        assert result.keys() == KEYS
        assert math.isfinite(result["ratio"]), name
        assert result["ours"] > 0, name
        assert result["peer"] > 0, name
        assert f"\n{name} " in ran.stdout
    assert table.PAGE.read_bytes() == page, "only a full run writes the page"


def test_an_unknown_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_a_broken_row_stops_no_other_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (replace(ROW, name="first", scene=broken), ROW)
    results = tmp_path / "results.json"
    assert main(["--quick", "--results", str(results)], rows) == 1
    assert "broken: first" in capsys.readouterr().err
    assert list(json.loads(results.read_text())) == ["row"]


@pytest.mark.parametrize("values", [[math.nan], [math.inf, 1.0]])
def test_what_is_not_finite_is_broken(values: list[float]) -> None:
    row = replace(ROW, scene=lambda _: {"ours": values, "them": [1.0]})
    assert measure((row,), quick=True) == {}


def test_a_peer_that_cannot_be_had_is_skipped_with_a_word(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    rows = (replace(ROW, scene=skipped), replace(ROW, name="other", peer="nobody"))
    assert main(["--quick", "--results", str(results)], rows) == 0
    assert measure(rows, quick=True) == {
        "row": "skipped: no such peer here",
        "other": "skipped: a peer: it cannot be had here, see `make tools`",
    }
    assert json.loads(results.read_text()) == {}


# Rows and figures.


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_scene_says_what_it_measures() -> None:
    for row in ROWS:
        text = row.scene.__doc__ or ""
        assert re.search(r"clock|same as|mean of a minute|resident", text), row.name


def test_the_ratio_is_of_the_medians() -> None:
    assert figure(ROW) == Figure(0.5, 0.5, 2.0, 4.0, "ms", 3, 0.0)


def test_without_a_peer_the_figure_stands_for_itself() -> None:
    assert figure(replace(ROW, peer="", against="")).ratio == 2.0
    assert figure(replace(ROW, peer="", against="")).peer is None


def test_our_tail_is_held_against_the_peers_median() -> None:
    found = figure(replace(ROW, statistic=p99))
    assert found.ours == pytest.approx(2.98)
    assert found.peer == 4.0


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (ROW, 0.5, True),
        (ROW, 0.51, False),
        (replace(ROW, at_least=True), 0.5, True),
        (replace(ROW, at_least=True), 0.49, False),
    ],
)
def test_when_a_goal_is_met(row: Row, ratio: float, met: bool) -> None:  # noqa: FBT001 - a table
    assert row.met(ratio) is met


def test_spread_is_the_middle_half_by_the_median() -> None:
    assert spread([1.0, 2.0, 3.0]) == 0.0
    assert spread([8.0, 9.0, 10.0, 11.0, 12.0]) == pytest.approx(0.3)


def test_a_scene_is_measured_once_for_all_its_rows() -> None:
    seen: list[Stage] = []

    def scene(stage: Stage) -> Values:
        seen.append(stage)
        return {"ours": [1.0], "them": [2.0]}

    rows = (replace(ROW, scene=scene), replace(ROW, name="other", scene=scene))
    assert len(measure(rows, quick=True)) == 2
    assert len(seen) == 1


# The page.


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    rows = (
        ROW,
        replace(ROW, name="far", goal=1e-9),
        replace(ROW, name="more", at_least=True),
        replace(ROW, name="alone", peer="", against=""),
        replace(ROW, name="none", scene=skipped),
    )
    table.write_page(rows, measure(rows, quick=True), page)
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n\nMeasured on ")
    assert text.endswith(f"\n{table.END}\nafter\n")
    assert "| `row` | work | a peer | 0.5 | ≤ 0.5 | 2 ms | 4 ms | 3 | 0% |" in text
    assert "| `far` | work | a peer | 0.5 (missed) | ≤ 1e-09 | 2 ms | 4 ms | 3 | 0% |" in text
    assert "| `alone` | work | none | 2 (missed) | ≤ 0.5 ms | 2 ms | none | 3 | 0% |" in text
    assert "| `none` | work | a peer | skipped: no such peer here | ≤ 0.5 | | | | |" in text
    assert f"{'row':<20} {'█' * 30}┃ 1.00" in text
    assert re.search(r"^far +█{30}┃█{29}▶", text, re.MULTILINE)
    assert "old" not in text


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="marks"):
        table.write_page((ROW,), {"row": figure(ROW)}, page)
    assert page.read_text() == "no marks\n"


def test_the_page_has_its_marks() -> None:
    text = table.PAGE.read_text()
    assert text.index(table.BEGIN) < text.index(table.END)


# What it sees by.


def test_going_waits_for_the_last_name(folder: Path) -> None:
    stale_pair(folder, "sid")
    pair = folder / "sid.rpc.sock", folder / "sid.rpc.sock.pid"
    code = "import os,sys,time; os.unlink(sys.argv[1]); time.sleep(0.2); os.unlink(sys.argv[2])"
    with Going(*pair) as going:
        begun = time.perf_counter()
        remover = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, *map(str, pair)])
        assert going.wait(*pair) - begun > 0.2
        assert not any(path.exists() for path in pair)
    assert remover.wait() == 0


def test_going_does_not_spin(folder: Path) -> None:
    file = folder / "file"
    file.touch()
    code = "import os,sys,time; time.sleep(0.3); os.unlink(sys.argv[1])"
    with Going(file) as going:
        before = time.thread_time()
        remover = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, str(file)])
        going.wait(file)
        assert time.thread_time() - before < 0.1
    assert remover.wait() == 0


def test_a_wait_in_vain_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.watching.WAIT", 0.05)
    file = folder / "file"
    file.touch()
    with Going(file) as going, pytest.raises(TimeoutError, match="file"):
        going.wait(file)
    with pytest.raises(TimeoutError, match="file"):
        all_gone([str(file)], 0.05)


def test_dead_pids_are_nobodys() -> None:
    pids = dead_pids(50)
    assert len(set(pids)) == 50
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_storm_has_as_many_events_as_it_says(folder: Path) -> None:
    asked = IN_CREATE | IN_ATTRIB | 0x8 | 0x40 | 0x80 | 0x200  # what the reconciler's watch asks
    storm(folder, 200)  # its logs are there now
    with notices(asked, folder) as descriptor:
        storm(folder, 200)
        assert count(descriptor) == 200


def count(descriptor: int) -> int:
    """Notices that wait to be read; each has a header of 16 bytes, its name's length last."""
    data = os.read(descriptor, 1 << 20)
    found = at = 0
    while at < len(data):
        at += 16 + int.from_bytes(data[at + 12 : at + 16], sys.byteorder)
        found += 1
    return found
