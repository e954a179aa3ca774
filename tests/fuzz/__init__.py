"""Random calls of the public API against plain torch in float64: ``python -m tests.fuzz --help``.

`values` makes tensors, `oracle` is the mathematics, `calls` draws calls of the ops, `judge` holds their results to the oracle, `heads`
does both for the layers, and `runner` runs rounds of hypothesis in a process of their own.
"""
