# SPDX-License-Identifier: Apache-2.0
"""SmolLM2, and what was observed of it, once for all modules: both take many seconds."""

import pytest

from fastkv.calibrate.gguf import observe_llama
from fastkv.calibrate.observe import Observer
from fastkv.eval.bounds import CALIBRATION
from fastkv.eval.source import Source
from fastkv.eval.text import Span


@pytest.fixture(scope="session")
def smollm2():
    return Source.load(None, None, {"--score": Span(0, 256), "--calibrate": CALIBRATION})


@pytest.fixture(scope="session")
def observer(smollm2):
    """Weighted by attention; min and max do not read the weights."""
    observer = Observer(smollm2.model.num_layers, by_attention=True)
    observe_llama(smollm2.model.llama, [smollm2.ids[CALIBRATION.slice]], observer)
    return observer
