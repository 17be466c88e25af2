"""``clipes bench`` measures what it says, in the form that others script against."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from clipes.kernels.choose import processor_features

pytestmark = pytest.mark.slow


def bench(*options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "clipes", "bench", "--json", "--rounds", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(not processor_features().get("avx2"), reason="a processor without AVX2")
def test_what_attention_is_worth_can_be_measured() -> None:
    worth = bench("--without", "attention")
    assert worth["kernel"] == "attention"
    assert worth["seconds_without"] > 0
    assert worth["ratio"] > 0.8  # one round on a machine that may be busy; 1.24 when it is not


def test_one_round_on_one_thread() -> None:
    result = bench("--threads", "1")
    assert list(result["cam_speedup_by_classes"]) == ["1", "2", "4", "8"]
    cam = result["cam"]["1"]
    # See ``CamTimes``: scaling flat maps to [0, 1] magnifies rounding.
    assert cam["largest_difference"] < 0.05
    for classes, ratio in result["cam_speedup_by_classes"].items():
        assert ratio > 0
        assert cam["bytes"][classes] < 0.01 * cam["bytes_literal"][classes]
    assert max(result["cam_speedup_by_classes"].values()) > 1
    assert 150 < cam["encoder_gflop"] < 157  # 12 blocks of 12 D^2 and 2 T D products per token
    assert cam["encoder_share_of_peak"] > 0
    assert list(result["crf"]) == (["3", "21"] if find_spec("pydensecrf") else [])
    assert all(row["label_agreement"] > 0.999 for row in result["crf"].values())
