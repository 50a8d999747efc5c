"""The benchmark counts right and prints what it promises, whatever the speed."""

import csv
import json
import shlex
import subprocess
import sys

import keras
import pytest
from conftest import ROOT, load

throughput = load(ROOT / "benchmarks" / "throughput.py")


def test_multiply_adds():
    lenet = load("LeNet_keras").lenet()
    # conv1, conv2, and three dense layers
    by_hand = 28**2 * 6 * 75 + 10**2 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert throughput.multiply_adds(lenet) == by_hand
    grouped = load("ResNeXt_keras").resnext(4, 64).get_layer("stage1_block1_conv2")
    one_layer = keras.Model(grouped.input, grouped.output)
    # 256 channels, each made of the 64 of its group
    assert throughput.multiply_adds(one_layer) == 32**2 * 256 * 9 * 64


@pytest.fixture
def benchmark(tmp_path):
    def benchmark(*options):
        return subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return benchmark


def test_table_csv_and_picture(benchmark, tmp_path):
    script = "1_Lecun_Network/LeNet_dp_keras.py"
    options = ["--seconds", "0.2", "--repeats", "2", "--csv", "speed.csv", "--picture", "speed.png"]
    done = benchmark(*options, script, f"{script} --batch_size 0")
    assert done.returncode == 1  # of the second configuration, which does not spoil the first
    assert f"error: {script} --batch_size 0: " in done.stderr
    (row,) = csv.DictReader((tmp_path / "speed.csv").open())
    assert row["network"] == "LeNet_dp" and row["parameters"] == "62006"
    slowest, median, fastest = (float(row[key]) for key in ("slowest", "images_per_s", "fastest"))
    assert 0 < slowest <= median <= fastest
    hours = 200 * (50000 + 10000 / 3) / median / 3600
    assert float(row["training_hours"]) == pytest.approx(hours)
    assert 0 < float(row["share_of_limit"]) < 1
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.splitlines()) == 3  # the machine, the header, one row


def test_comparison_takes_turns_and_quotes_ratios(monkeypatch, tmp_path, capfd):
    rates = iter([2.0, 8.0, 6.0])
    monkeypatch.setattr(
        throughput, "in_new_process", lambda *_: {"images_per_s": next(rates), "peak_rss_mb": 100}
    )
    peer = tmp_path / "peer.py"
    peer.write_text(
        f"print('starting'); print({json.dumps({'images_per_s': 2.0, 'peak_rss_mb': 200})!r})"
    )
    command = shlex.join([sys.executable, str(peer)])
    throughput.compare("LeNet_keras.py", "float32", 1, 3, command)
    *pairs, rate, memory = capfd.readouterr().out.splitlines()
    assert [pair.split()[1] for pair in pairs] == ["2.00", "8.00", "6.00"]
    assert rate == "images_per_s: ours / theirs 3.000 (1.000 to 4.000)"
    assert memory == "peak_rss_mb: ours / theirs 0.500 (0.500 to 0.500)"

    rates = iter([2.0])
    peer.write_text("print('no figures')")
    with pytest.raises(SystemExit, match="prints no JSON line with images_per_s"):
        throughput.compare("LeNet_keras.py", "float32", 1, 3, command)
