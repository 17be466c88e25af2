"""``clipes bench`` measures what it says, in the form that others script against."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_one_round_on_one_thread() -> None:
    command = [sys.executable, "-m", "clipes", "bench", "--json", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert list(result["cam_speedup_by_classes"]) == ["1", "2", "4", "8"]
    cam = result["cam"]["1"]
    # Random weights attend almost evenly: scaling such flat maps to [0, 1] magnifies rounding.
    assert cam["largest_difference"] < 0.05
    for classes, ratio in result["cam_speedup_by_classes"].items():
        assert ratio == cam["seconds_literal"][classes] / cam["seconds"][classes]
        assert cam["bytes"][classes] < 0.01 * cam["bytes_literal"][classes]
    assert max(result["cam_speedup_by_classes"].values()) > 1
    assert 150 < cam["encoder_gflop"] < 157  # 12 blocks of 12 D^2 and 2 T D products per token
    assert cam["encoder_share_of_peak"] > 0
    assert all(row["label_agreement"] > 0.999 for row in result["crf"].values())
