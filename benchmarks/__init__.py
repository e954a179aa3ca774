"""Measurements of the ops against the best that plain torch and others offer (docs/benchmarks.md)."""
