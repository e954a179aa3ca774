"""Training runs as the examples make them: data, networks by name, checkpoints and the loop; `explain` opens a run by these.

Needs the extras demo and networks.
"""
