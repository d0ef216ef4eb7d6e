"""The codec table: how small targets can be stored, what that costs, and what it does to a student.

`candidates` holds the codecs, `distortion` measures them on features, `students` trains students on what they leave,
`command` is ``python -m pipelines codecs`` and writes the page. A candidate that earns it moves to `olavlm.data.codec`.
"""
