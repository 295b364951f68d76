"""What the closed form, a fusion, a training step and writing a checkpoint cost, each beside the plain way of doing it.

``python -m realera_nodes.bench.speed closed-form|fusion|training|streaming``; docs/speed.md says what is measured and how.
Nothing here is a test: results are printed, and no time makes anything fail.
"""
