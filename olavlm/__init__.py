"""What both sides share: the contracts on disk (`data`), the student (`model`), benchmarks (`eval`), the configuration.

Imports none of `featurize`, `train`, `pipelines`.
"""
