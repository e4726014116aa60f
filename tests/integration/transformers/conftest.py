# SPDX-License-Identifier: Apache-2.0
"""The models are tiny: more threads only wait for each other."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
