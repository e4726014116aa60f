# SPDX-License-Identifier: Apache-2.0
"""`fastkv calibrate` on SmolLM2: what the best methods gain, and what Ctrl-C leaves behind."""

import signal
import subprocess
import sys
import time

import pytest

from fastkv.calibrate.methods import Recipe
from fastkv.calibrate.source import load
from fastkv.eval.bounds import CALIBRATION
from fastkv.eval.errors import TextError
from fastkv.eval.measure import Evaluation
from fastkv.eval.settings import Settings
from fastkv.eval.text import Span
from fastkv.quant import QUANT_SPECS, Granularity


def kls(smollm2, observer, name, recipes, layouts):
    """KL of each recipe in each layout; None is the recommended one."""
    formats = (QUANT_SPECS[name],)
    settings = Settings(formats, Span(0, 256), CALIBRATION, granularities=layouts, recipes=recipes)
    evaluation = Evaluation(smollm2.model, smollm2.ids, settings)
    scales = {c: observer.scales(c.quant, c.layout, c.recipe) for c in evaluation.subjects}
    return [row.kl for row in evaluation.scored(scales).rows]


def test_the_search_beats_min_and_max_in_4_bits(smollm2, observer):
    """Over 3,072 tokens .076 and .101, and .067 with the positions of these."""
    layouts = (Granularity.CHANNEL,)
    best, plain = kls(smollm2, observer, "cache_int4_zp", (None, Recipe()), layouts)
    assert best < 0.85 * plain


def test_headroom_brings_int8_per_channel_below_per_head(smollm2, observer):
    layouts = (Granularity.CHANNEL, Granularity.HEAD)
    by_channel, by_head = kls(smollm2, observer, "cache_int8", (None,), layouts)
    assert by_channel < 0.0021
    assert by_channel < by_head


def test_a_text_shorter_than_asked_is_named(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Alice was beginning to get very tired.")
    with pytest.raises(TextError, match=r"--tokens 0:99 of short\.txt: expected 99 tokens, got"):
        load(None, path, "0:99", 2048)


def test_ctrl_c_leaves_no_file(tmp_path):
    # What a shell starts in the background ignores Ctrl-C, and so do its children.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heed}; from fastkv.cli import main; main()"]
    options = ["--format", "cache_int8", "-o", str(tmp_path / "s.safetensors")]
    process = subprocess.Popen([*command, "calibrate", *options], stderr=subprocess.DEVNULL)
    time.sleep(4)
    assert process.poll() is None  # it works for much longer
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert list(tmp_path.iterdir()) == []
