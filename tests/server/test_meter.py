"""Rates over the last seconds."""

from __future__ import annotations

from nbdstore.server.meter import N_SAMPLES, Meter


def test_at_first_there_is_none() -> None:
    assert Meter(10.0, (0, 5)).rates(10.0, (0, 5)) == (0.0, 0.0)


def test_a_young_connection_is_measured_since_its_start() -> None:
    assert Meter(10.0, (0, 0)).rates(10.5, (20, 0)) == (40.0, 0.0)


def test_only_the_last_seconds_count() -> None:
    meter = Meter(0.0, (0,))
    for second in range(1, 100):
        meter.sample(float(second), (1000 * second,))
    for second in range(100, 100 + N_SAMPLES):
        meter.sample(float(second), (99_000,))
    assert meter.rates(float(100 + N_SAMPLES), (99_000,)) == (0.0,)


def test_samples_that_come_fast_do_not_shorten_the_window() -> None:
    meter = Meter(0.0, (0,))
    for step in range(1, 41):
        meter.sample(step / 10, (step,))
    assert meter.rates(4.0, (40,)) == (10.0,)
