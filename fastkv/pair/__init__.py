# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode in two processes: `fastkv serve-pair`, an example of `fastkv.transfer` in use.

`job` is what all processes are told, `worker` what each of them does, `run` what starts them and
compares their tokens with one process's.
"""
