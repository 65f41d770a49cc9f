from __future__ import annotations

import pytest

from reconciler.accounts import Account

THREE = b"one\ntwo\nthree\n"  # they end at 4, 8 and 14


@pytest.mark.parametrize(
    ("taken", "confirmed"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (13, 2), (14, 3)]
)
def test_a_message_is_taken_when_its_line_feed_is(taken: int, confirmed: int) -> None:
    account = Account(THREE, 3)
    account.strike(taken)
    account.strike(0)  # what was taken stays so
    assert (account.taken, account.total) == (confirmed, 3)
    assert account.complete == (confirmed == 3)


@pytest.mark.parametrize(
    ("handed", "unsent"), [(0, 3), (1, 2), (4, 2), (5, 1), (8, 1), (9, 0), (14, 0)]
)
@pytest.mark.parametrize("taken", [0, 4, 8])
def test_a_message_is_unsent_when_no_byte_of_it_was_handed_over(
    handed: int, unsent: int, taken: int
) -> None:
    account = Account(THREE, 3)
    account.strike(min(taken, handed))
    assert account.unsent(handed, sending=False) == unsent


def test_a_stream_grows_and_what_it_could_not_send_counts_as_unsent() -> None:
    account = Account(b"", 0)
    for line in (b"one\n", b"two\n"):
        account.add(line)
    account.strike(4)
    account.refuse()
    assert (account.size, account.taken, account.total) == (8, 1, 3)
    assert account.unsent(4, sending=False) == 2
    assert account.unsent(4, sending=True) == 1, "some of it may have been handed over"
    account.withdraw(b"two\n")
    assert (account.size, account.total, account.complete) == (4, 2, True)
    account.add(b"three\n")
    account.strike(10)
    assert (account.taken, account.unsent(10, sending=False)) == (2, 1)
