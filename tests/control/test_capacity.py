"""The capacity model in numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from nbdstore.control import capacity
from nbdstore.control.capacity import CapacityReport, Growth, GrowthMeter

GIB = 1 << 30


def model(growth: Growth | None = None) -> CapacityReport:
    return capacity.report(
        block_size=4096,
        capacity=100 * GIB,
        used=26 * GIB,
        free=70 * GIB,
        mapped=25 * GIB,
        sizes=[150 * GIB, 50 * GIB],
        growth=growth,
    )


def test_block_capacity_is_blocks_times_block_size() -> None:
    report = model()
    assert report.n_blocks * report.block_size == report.block_capacity == 100 * GIB


def test_data_is_mapped_blocks_times_block_size() -> None:
    report = model()
    assert report.n_mapped * report.block_size == report.data == 25 * GIB


def test_overcommit_and_fill() -> None:
    assert model().overcommit == 2.0
    assert model().fill == 0.26


def test_containers_are_counted_when_they_are_stated() -> None:
    assert model().container_capacity == 0
    assert model().integrated_capacity == 100 * GIB
    report = model().with_containers([10 * GIB] * 20)
    assert report.container_capacity == 200 * GIB
    assert report.integrated_capacity == 300 * GIB


def test_space_runs_out_when_the_growth_seen_goes_on() -> None:
    report = model(Growth(bytes_per_s=GIB, window_s=600))
    assert report.exhausted_in_s == 70


@pytest.mark.parametrize("growth", [None, Growth(0, 600), Growth(-5, 600)])
def test_no_end_is_foretold_without_growth(growth: Growth | None) -> None:
    assert model(growth).exhausted_in_s is None


def test_an_empty_model_divides_by_nothing() -> None:
    report = capacity.report(
        block_size=4096, capacity=0, used=0, free=0, mapped=0, sizes=[], growth=None
    )
    assert (report.overcommit, report.fill) == (0, 0)


class TestGrowthMeter:
    def test_growth_is_the_mean_over_the_window(self) -> None:
        meter = GrowthMeter()
        for minute, used in enumerate([0, 600, 600, 1800]):
            meter.add(1000 + 60 * minute, used)
        assert meter.growth() == Growth(bytes_per_s=10, window_s=180)

    def test_too_little_was_seen(self) -> None:
        meter = GrowthMeter()
        assert meter.growth() is None
        meter.add(0, 0)
        assert meter.growth() is None
        meter.add(30, 500)
        assert meter.growth() is None

    def test_the_window_moves(self) -> None:
        meter = GrowthMeter(n_samples=2)
        for minute, used in enumerate([0, 6000, 6600]):
            meter.add(60 * minute, used)
        assert meter.growth() == Growth(bytes_per_s=10, window_s=60)
