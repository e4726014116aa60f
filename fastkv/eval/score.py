# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL and top-1 agreement, added up chunk by chunk in float64."""

from math import exp, nan
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F64 = NDArray[np.float64]

# Rows whose log-probabilities are held at once: 64 of 49,152 in float64 are 25 MB.
_ROWS = 64


class Score:
    """How one model predicts a text, beside the same model over an unquantized cache.

    A row counts where the text has a next token.

    Attributes:
        rows: counted.
        nll: sum of `-log q(next token)`.
        kl: sum of `KL(p || q)`, p the unquantized model's distribution, in nats.
        agreed: rows whose most likely token is p's.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.nll = 0.0
        self.kl = 0.0
        self.agreed = 0

    def add(
        self, exact: "NDArray[Any]", logits: "NDArray[Any]", targets: "NDArray[np.int64]"
    ) -> None:
        """Count rows.

        Args:
            exact: the unquantized model's logits, `[n, vocabulary]`.
            logits: this model's.
            targets: the next token of each row, `[m]`; rows from m on have none.
        """
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, min(start + _ROWS, len(targets)))
            log_p, log_q = log_softmax(exact[rows]), log_softmax(logits[rows])
            at = np.arange(len(log_q))
            self.rows += len(at)
            self.nll -= float(log_q[at, targets[rows]].sum())
            self.kl += float((np.exp(log_p) * (log_p - log_q)).sum())
            self.agreed += int((log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum())

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-likelihood."""
        return exp(self.nll / self.rows) if self.rows else nan

    @property
    def mean_kl(self) -> float:
        """KL a token, in nats."""
        return self.kl / self.rows if self.rows else nan

    @property
    def top1(self) -> float:
        """Share of rows whose most likely token agrees."""
        return self.agreed / self.rows if self.rows else nan


def log_softmax(logits: "NDArray[Any]") -> "F64":
    """Log-probabilities in float64."""
    shifted: F64 = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
