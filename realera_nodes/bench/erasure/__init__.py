"""The erasure benchmark: what is gone (Acc_e, Acc_g, residue) and what stays (Acc_s), every method in one run.

``python -m realera_nodes bench objects|ablation|mass|styles|celebrities|explicit|coco``; docs/benchmark.md says what is
measured and how.
"""
