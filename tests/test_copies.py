"""The repetition between the scripts stays what it is meant to be."""

import ast
import difflib
import shutil
import subprocess
import sys
from pathlib import Path

import copies
import pytest
from conftest import SCRIPTS


def test_blocks_of_one_name_have_one_text():
    assert copies.differences() == []


def test_command_finds_and_mends_an_altered_copy(tmp_path):
    for path in (copies.REFERENCE, SCRIPTS["LeNet_keras"], Path(copies.__file__)):
        (tmp_path / path.parent.name).mkdir()
        shutil.copy(path, tmp_path / path.parent.name)
    tool = [sys.executable, tmp_path / "tests" / "copies.py"]
    altered = tmp_path / "1_Lecun_Network" / "LeNet_keras.py"
    right = altered.read_text()
    assert subprocess.run(tool).returncode == 0
    altered.write_text(right.replace("def fail(message):", "def fail(message):\n    # mine"))
    found = subprocess.run(tool, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "LeNet_keras.py: fail\n")
    assert subprocess.run([*tool, "--fix"]).returncode == 0
    assert altered.read_text() == right
    altered.write_text(
        right.replace("def fail(message):", "def mine():\n    pass\n\n\ndef fail(message):")
    )
    found = subprocess.run(tool, capture_output=True, text=True)
    assert found.returncode == 1 and "other parts" in found.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_imports_nothing_of_this_repository(name):
    # Pillow comes with matplotlib.
    allowed = {"tensorflow", "keras", "numpy", "matplotlib", "PIL"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(SCRIPTS[name].read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in allowed


LESSONS = [
    ("LeNet_keras", "LeNet_dp_keras", {"lenet", "build_network"}),
    ("LeNet_dp_keras", "LeNet_dp_da_keras", {"augment", "lenet"}),
    ("LeNet_dp_da_keras", "LeNet_dp_da_wd_keras", {"KERNEL", "lenet"}),
]


@pytest.mark.parametrize("before, after, lesson", LESSONS)
def test_ladder_steps_differ_by_their_lesson_only(before, after, lesson):
    texts, sources = [], [SCRIPTS[name].read_text() for name in (before, after)]
    for source in sources:
        lines = source.splitlines()
        spans = copies.blocks(source)
        texts.append({block: lines[start:end] for block, (start, end) in spans.items()})
    blocks = texts[0].keys() | texts[1].keys()
    assert {b for b in blocks if texts[0].get(b) != texts[1].get(b)} == lesson
    for block in lesson - {"augment"}:
        steps = list(difflib.ndiff(texts[0][block], texts[1][block]))
        assert sum(line.startswith("+ ") for line in steps) <= 5, steps
    if "KERNEL" in lesson:
        assert "L2(1e-4)" in " ".join(texts[1]["KERNEL"])
