# SPDX-License-Identifier: Apache-2.0
"""What a model's `config.json` says about its KV cache, in any of the forms that engines read."""

from fastkv.engine_config.model import (
    MAX_LAYERS,
    ModelConfig,
    parse_config,
    read_config,
    spec_from_config,
)

__all__ = ["MAX_LAYERS", "ModelConfig", "parse_config", "read_config", "spec_from_config"]
