# SPDX-License-Identifier: Apache-2.0
"""The main job on real input: a mixed batch of SmolLM2's Q, K and V through every backend × format.

`sample` loads the data, `schedule` plans the steps of an engine, `serve` runs them, `truth` is
float64 attention over the unquantized K and V with the error that a format's step predicts, and
`measure` puts the rows of the table together.
"""
