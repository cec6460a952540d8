"""The plots are drawn, of what there is, and the same results give the same picture."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plots
from benchmarks.model import Point, Unit
from tests.benchmarks import made_up


def test_bars_for_each_group_and_lines_for_each_series(tmp_path: Path) -> None:
    depths = [
        made_up.row(
            f"reads-{depth}",
            point=Point("random read", "depth", depth),
            nbdstore=[depth * 2.0, depth * 3.0],
            nbdkit=[depth * 1.0],
        )
        for depth in (1, 32)
    ]
    opening = made_up.row("open", Unit.SECONDS, group="opening", nbdstore=[0.4], nbd_server=[0.2])
    written = plots.draw(made_up.run(*depths, opening), tmp_path)
    names = {"random", "opening", "line-random-read"}
    assert {path.name for path in written} == {f"{n}.{k}" for n in names for k in ("png", "svg")}
    assert (tmp_path / "random.png").read_bytes().startswith(b"\x89PNG")
    # matplotlib draws letters as shapes, and names them in a comment.
    for picture in ("random.svg", "line-random-read.svg"):
        text = (tmp_path / picture).read_text()
        assert "<!-- nbdkit -->" in text
        assert "<!-- commit 0123abc, 2026-01-02T03:04:05Z, 2 x 0.5 s -->" in text
        assert "<!-- Linux 6.1 -->" in text


def test_nothing_measured_is_no_plot(tmp_path: Path) -> None:
    assert plots.draw(made_up.run(made_up.row()), tmp_path) == []


def test_the_same_results_give_the_same_picture(tmp_path: Path) -> None:
    run = made_up.run(made_up.row(nbdstore=[1.0], nbdkit=[2.0]))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        plots.draw(run, tmp_path / name)
    one, two = ((tmp_path / name / "random.svg").read_bytes() for name in ("one", "two"))
    assert one == two
