"""What comes while the worker is busy is answered together; one bad query spoils no other."""

import threading
from collections.abc import Sequence

import pytest

from locvlm.serving.batching import Batcher


class Doubler:
    """Answers 2 n, when it is let; -1 makes the whole call fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free, self.begun = threading.Event(), threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.begun.set()
        assert self.free.wait(30)
        self.batches.append(list(numbers))
        if -1 in numbers:
            raise RuntimeError("bad query")
        return [2 * number for number in numbers]


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


def started(doubler: Doubler, size: int = 4) -> Batcher[int, int]:
    """A batcher at work on the number 0."""
    batcher: Batcher[int, int] = Batcher(doubler, size)
    batcher.submit(0)
    assert doubler.begun.wait(30)
    return batcher


def test_what_gathered_is_answered_in_batches_of_at_most_the_size(doubler: Doubler) -> None:
    batcher = started(doubler)
    futures = [batcher.submit(number) for number in range(1, 7)]
    doubler.free.set()
    assert [future.result(30) for future in futures] == [2, 4, 6, 8, 10, 12]
    assert doubler.batches == [[0], [1, 2, 3, 4], [5, 6]]
    batcher.close()
    assert not batcher.alive


def test_a_query_that_fails_fails_alone_and_the_worker_goes_on(doubler: Doubler) -> None:
    batcher = started(doubler)
    futures = [batcher.submit(number) for number in (1, -1, 3)]
    doubler.free.set()
    assert (futures[0].result(30), futures[2].result(30)) == (2, 6)
    with pytest.raises(RuntimeError, match="bad query"):
        futures[1].result(30)
    assert batcher.submit(5).result(30) == 10
    batcher.close()


def test_a_query_that_nobody_waits_for_any_more_is_left_out(doubler: Doubler) -> None:
    batcher = started(doubler)
    left, wanted = batcher.submit(1), batcher.submit(2)
    assert left.cancel()
    doubler.free.set()
    assert wanted.result(30) == 4
    assert doubler.batches == [[0], [2]]
    batcher.close()


def test_closing_answers_what_is_waiting(doubler: Doubler) -> None:
    batcher = started(doubler)
    futures = [batcher.submit(number) for number in range(1, 7)]
    doubler.free.set()
    batcher.close()
    assert all(future.done() for future in futures)
