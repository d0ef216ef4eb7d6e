"""The demo world: rendered scenes, their language and benchmark, and the recipe for the tiny teachers that ship here.

``scenes`` renders, ``language`` speaks about what was rendered, ``benchmark`` asks, ``build`` writes corpora,
``recipe`` trains everything under ``weights/`` from nothing. No network, no hub; all randomness comes from a seed.
"""
