"""What the benchmarks conclude from their times, and that the README says it. The times themselves are not tested."""

import sys
from functools import partial

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import measure
import table
import training
from start import repeat_pairs

from unetseg.data import load_split
from unetseg.model import UNet


@pytest.mark.parametrize(
    "target, ours, theirs, ratio, met",
    [
        ("≥ 2", 1.0, 3.0, 3.0, True),
        ("≥ 2", 1.0, 1.5, 1.5, False),
        ("≤ 1.1", 1.0, 2.0, 0.5, True),
        ("≤ 1.1", 3.0, 2.0, 1.5, False),
        ("", 1.0, 3.0, 3.0, None),
    ],
)
def test_a_comparison_reads_its_target(target, ours, theirs, ratio, met):
    row = measure.compare("a", "b", target, lambda: ours, lambda: theirs)
    assert (row.ratios, row.median, row.met) == ([ratio] * 5, ratio, met)


def test_contenders_work_and_end():
    with measure.Contender(partial, sum, (1, 2)) as contender:
        seconds, peak = contender.run()
        assert seconds >= 0 and peak > 10
    assert not contender.process.is_alive()


def test_flops_of_the_published_network():
    assert training.giga_flops(UNet(7, 64, 3), training=False) == pytest.approx(73.6, rel=0.01)


def test_a_split_can_be_repeated_under_other_names(processed, tmp_path):
    repeat_pairs(processed, tmp_path / "many", 20)
    assert len(load_split(tmp_path / "many", "train")) == 20


def test_the_readme_shows_the_committed_speeds():
    files = table.committed()
    assert files and table.markdown(files) in (ROOT / "README.md").read_text(encoding="utf-8")
