"""What a person runs: one YAML per pipeline, the stage runner, the report, benchmarks, the demo world.

May import everything; nothing imports it.
"""
