from __future__ import annotations

import asyncio
import time

from conftest import asynchronous, happens

from reconciler.pulse import Pulse


@asynchronous
async def test_it_beats_at_once_and_again_until_it_is_stopped() -> None:
    lags: list[float] = []
    pulse = Pulse(0.01)
    pulse.listen(lags.append)
    pulse.start()
    assert len(lags) == 1
    await happens(lambda: len(lags) > 3)
    pulse.stop()
    pulse.stop()
    beats = len(lags)
    await asyncio.sleep(0.05)
    assert len(lags) == beats
    assert min(lags) >= 0


@asynchronous
async def test_a_loop_that_is_held_up_is_silent_and_the_next_beat_says_how_late_it_is() -> None:
    lags: list[float] = []
    pulse = Pulse(0.01)
    pulse.listen(lags.append)
    pulse.start()
    time.sleep(0.2)  # noqa: ASYNC251 - it is what is tested
    assert pulse.silence >= 0.2
    await happens(lambda: len(lags) > 1)
    assert lags[1] > 0.15
    await happens(lambda: pulse.silence < 0.2, "it is not silent any more")
    pulse.stop()
