"""The measurement of the HTTP tier measures: a short run of it on the real service."""

from benchmarks.http_tier import measure, service


def test_every_stream_is_served_and_its_cost_is_told():
    with service(http_workers=1, steps_per_second=100, busy_threads=2) as running:
        (sample,) = measure(running, streams=4, seconds=0.5, repetitions=1)
    assert sample.tokens > 4
    assert sample.http_us > 0
    assert sample.pool_us > 0
    assert len(sample.latencies) > 4
    assert not running.directory.exists()
