"""Batches in parts: what is together, and whose failure it is."""

from __future__ import annotations

import pytest

from rlaif_env.api import BackendError
from rlaif_env.batches import isolate_failures, length_buckets


def test_every_row_is_in_one_bucket_and_no_bucket_is_too_large() -> None:
    lengths = [3, 50, 7, 7, 48, 2, 9, 51, 200]
    buckets = length_buckets(lengths, 110, extra=2)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(9))
    assert buckets[0] == [8]  # longer than a bucket: alone
    assert all(len(b) == 1 or len(b) * (max(lengths[i] for i in b) + 2) <= 110 for b in buckets)
    assert buckets[1] == [7, 1]


@pytest.mark.parametrize("says", [True, False])
def test_a_failing_row_does_not_touch_the_others(says: bool) -> None:
    def call(rows: list[int]) -> list[int]:
        if bad := [i for i, row in enumerate(rows) if row in (3, 40)]:
            raise BackendError("no", bad if says else ())
        return [10 * row for row in rows]

    results, failed = isolate_failures(call, [1, 2, 3, 4, 40, 50])
    assert results == {1: 10, 2: 20, 4: 40, 50: 500}
    assert sorted(failed) == [3, 40]


def test_errors_of_another_kind_are_raised() -> None:
    with pytest.raises(KeyError):
        isolate_failures(lambda rows: {}["x"], [1, 2], BackendError)
