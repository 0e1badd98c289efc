"""The submitter's log: every line once, whatever becomes of the stream."""

import time

import pytest

from locvlm.launch import launch
from tests.api_server import POLL, Cluster, rendered, run, when


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 8])
def test_a_log_stream_that_breaks_goes_on_with_no_line_lost_or_twice(
    cluster: Cluster, cut: int, stamps: bool, clean: bool
) -> None:
    cluster.clean = clean
    cluster.log = {"try-1-aaaaa": [f"step {index} loss {1 / (index + 1):.3f}" for index in range(9)]}
    cluster.stamps = stamps
    cluster.breaks = [cut, cut, 8]
    cluster.hold = lambda: cluster.n_logs < 4
    _, lines = run(cluster)
    assert cluster.n_logs >= 4
    assert lines == cluster.log["try-1-aaaaa"]


def test_a_reconnection_asks_only_for_the_last_minutes(cluster: Cluster) -> None:
    cluster.breaks = [2]
    cluster.hold = lambda: cluster.n_logs < 2
    run(cluster)
    asked = [query.get("sinceSeconds") for _, path, query in cluster.requests if path.endswith("/log")]
    assert asked[0] is None
    assert all(int(seconds) >= 300 for seconds in asked[1:])


def test_the_log_of_a_new_submitter_follows_the_rest_of_the_old_one(cluster: Cluster) -> None:
    cluster.log = {"try-1-aaaaa": ["one", "two", "three"]}
    cluster.breaks = [1]
    cluster.after_break = lambda: cluster.log.update({"try-1-bbbbb": ["four", "five"]})
    cluster.hold = lambda: cluster.n_logs < 3
    assert run(cluster)[1] == ["one", "two", "three", "four", "five"]


def test_a_log_that_cannot_be_read_does_not_matter_because_the_status_decides(cluster: Cluster) -> None:
    cluster.refuse = {"GET /log": [(500, "kubelet away")]}
    done, lines = run(cluster)
    assert done.ray_job_id
    assert lines == []


def test_a_log_stream_that_is_stuck_does_not_hold_up_the_end_or_lose_its_rest(cluster: Cluster) -> None:
    cluster.breaks = [1]
    cluster.stuck.set()
    cluster.hold = lambda: cluster.n_logs == 0
    started = time.monotonic()
    _, lines = run(cluster)
    assert time.monotonic() - started < 5
    assert lines == ["hello", "step 1 loss 2.5", "done"]
    cluster.stuck.clear()


def test_a_reader_that_hangs_up_does_not_end_the_job(cluster: Cluster) -> None:
    def write(_line: str) -> None:
        raise BrokenPipeError

    assert launch(rendered(), cluster.api, poll_seconds=POLL, write=write).ray_job_id


def test_the_log_of_a_retry_is_followed_when_the_earlier_submitter_is_gone(cluster: Cluster) -> None:
    """The operator deletes the submitter of the first try, as Kueue's preemption does."""
    cluster.log = {"try-1-aaaaa": ["one", "two"]}
    cluster.breaks = [1]

    def replace() -> None:
        cluster.gone.add("try-1-aaaaa")
        cluster.log["try-1-bbbbb"] = ["three", "four"]

    cluster.after_break = replace
    cluster.hold = lambda: cluster.n_logs < 3
    assert run(cluster)[1] == ["one", "three", "four"]


def test_a_log_without_a_submitter_for_a_while_goes_on_with_the_next_one(cluster: Cluster) -> None:
    cluster.log = {"try-1-aaaaa": ["one", "two"]}
    cluster.breaks = [1]
    cluster.after_break = lambda: cluster.gone.add("try-1-aaaaa")
    cluster.hold = lambda: len(cluster.log) < 2
    when(lambda: cluster.count("GET", "/pods") > 4, lambda: cluster.log.update({"try-1-bbbbb": ["three"]}))
    assert run(cluster)[1] == ["one", "three"]


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), UnicodeEncodeError("ascii", "x", 0, 1, "no")]
)
def test_a_log_that_cannot_be_written_does_not_end_the_job_and_is_told_once(
    cluster: Cluster, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def write(_line: str) -> None:
        raise fault

    assert launch(rendered(), cluster.api, poll_seconds=POLL, write=write).ray_job_id
    assert caplog.text.count("its log cannot be written here") == 1


def test_a_line_that_begins_with_a_date_keeps_it_where_stamps_are_missing(cluster: Cluster) -> None:
    cluster.stamps = False
    cluster.log = {"try-1-aaaaa": ["2026-01-01 loss 2.5", "20260101 done"]}
    assert run(cluster)[1] == ["2026-01-01 loss 2.5", "20260101 done"]
