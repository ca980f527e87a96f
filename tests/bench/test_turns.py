"""Measurements side by side: what is timed has the machine to itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from turns import Turns


def in_thread(act) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_whoever_is_alone_waits_until_all_others_wait_or_have_ended(tmp_path: Path) -> None:
    turns, inside, most = [Turns(tmp_path) for _ in range(3)], 0, 0
    said: list[int] = []

    def one(index: int) -> None:
        nonlocal inside, most
        with turns[index].alone(), turns[index].alone():
            inside += 1
            most = max(most, inside)
            said.append(index)
            time.sleep(0.05)
            inside -= 1
        turns[index].share()

    threads = [in_thread(lambda index=index: one(index)) for index in range(2)]
    time.sleep(0.2)
    assert not said, "the third one is getting ready"
    threads.append(in_thread(lambda: one(2)))
    for thread in threads:
        thread.join(10)
    assert sorted(said) == [0, 1, 2] and most == 1 and not any(turn.disturbed for turn in turns)


def test_those_who_get_ready_wait_for_those_who_want_to_be_alone(tmp_path: Path) -> None:
    first, order = Turns(tmp_path), []

    def want() -> None:
        with second.alone():
            order.append("alone")

    second = Turns(tmp_path)
    wanting = in_thread(want)
    time.sleep(0.2)  # it waits for the first one
    third = in_thread(lambda: (Turns(tmp_path), order.append("ready")))
    time.sleep(0.2)
    assert not order, "one who comes later does not go first"
    with first.alone():
        pass
    wanting.join(10)
    third.join(10)
    assert order == ["alone", "ready"]


def test_one_that_hangs_is_not_waited_for_without_end_and_that_is_said(tmp_path: Path) -> None:
    hangs, other = Turns(tmp_path), Turns(tmp_path, patience=0.1)
    with other.alone():
        assert other.disturbed == 1 and not hangs.disturbed
        time.sleep(0.2)
    assert other.disturbed >= 2, "so long that somebody may have gone on beside it"
