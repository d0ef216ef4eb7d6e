"""The contracts on disk: the corpus (tars and their index) and the target store (identity, codec, reading, committing).

Everything both sides read lives here. What makes a corpus or a target is in `featurize`.
"""
