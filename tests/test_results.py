"""Every accuracy on a page is that of the log it links to, or one that somebody else reported.

A link to a log holds the accuracy of the test images in its last row, in %; to line N of it, that
of epoch N - 1. With the title "training" it is that of the training images, and three numbers, as
in 80.87 (80.67 to 81.49), are median, least and greatest of the runs whose logs end in _1, _2 and
_3; with the title "best", of their best epochs.
"""

import re

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")])
NUMBER = re.compile(r"(?<![\d.])(?:\d\d\.\d\d|100\.00|\d\d\.\d(?= ?%))(?![\d.])")
LINK = re.compile(r'\[([^\]]*)\]\(([^)\s]+\.csv)(?:#L(\d+))?(?: "(\w+)")?\)')
# What papers and the collection of 2018 report, and what is no accuracy.
PAPERS = {
    "Lin 2013, table 1": ("91.19",),
    "He 2015, table 6": ("91.25", "92.49", "93.57"),
    "He 2016, table 2": ("93.63",),
    "Zagoruyko 2016, table 5": ("95.73", "96.00"),
    "Xie 2016, table 7": ("96.35", "96.42"),
    "Huang 2016, table 2": ("95.49",),
    "Hsueh 2018, table 1": ("93.09", "93.42", "93.58", "70.25", "70.07", "70.81"),
    "2018, LeNet": ("58.48", "60.41", "75.06", "76.23"),
    "2018, small": ("91.63", "93.53", "91.82", "92.68", "93.93"),
    "2018, large": ("95.13", "95.78", "94.91", "95.30", "95.90", "95.19", "95.60"),
}
OTHERS = {number for numbers in PAPERS.values() for number in numbers}


def accuracies(log, line, title):
    """The accuracy in % that a link to a log stands for."""
    rows = np.genfromtxt(log, delimiter=",", names=True, ndmin=1)
    column = 100 * rows["accuracy" if title == "training" else "val_accuracy"]
    return column.max() if title == "best" else column[int(line) - 2 if line else -1]


def expected(log, numbers, line, title):
    """The numbers that belong where these stand."""
    if len(numbers) == 1:
        found = [accuracies(log, line, title)]
    else:
        logs = [log.with_name(log.name.replace("_1.csv", f"_{run}.csv")) for run in (1, 2, 3)]
        runs = [accuracies(each, line, title) for each in logs]
        found = [np.median(runs), min(runs), max(runs)]
    return [f"{value:.{len(text.split('.')[1])}f}" for value, text in zip(found, numbers)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_accuracies_are_those_of_the_logs(page):
    for line in page.read_text().splitlines():
        for text, log, row, title in LINK.findall(line):
            if numbers := NUMBER.findall(text + " %"):
                assert len(numbers) in (1, 3), line
                assert numbers == expected(page.parent / log, numbers, row, title), line
        if "images/s" not in line:
            assert {*NUMBER.findall(LINK.sub("", line))} <= OTHERS, line


def test_docstrings_report_what_papers_do():
    for script in SCRIPTS.values():
        assert {*NUMBER.findall(script.read_text())} <= OTHERS


def test_a_wrong_number_is_found(tmp_path):
    log = tmp_path / "x_1.csv"
    for run, last in ((1, 0.5), (2, 0.7), (3, 0.6)):
        rows = f"epoch,accuracy,val_accuracy\n0,0.9,0.8\n1,1.0,{last}\n"
        (tmp_path / f"x_{run}.csv").write_text(rows)
    for numbers, line, title in (
        (["50.00"], "", ""),
        (["80.00"], "2", ""),
        (["100.00"], "", "training"),
        (["80.0"], "", "best"),
        (["60.00", "50.00", "70.00"], "", ""),
    ):
        assert expected(log, numbers, line, title) == numbers
    assert expected(log, ["50.01"], "", "") != ["50.01"]
