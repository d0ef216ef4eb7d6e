"""The offline side: packing corpora, and computing every teacher's features of every image once.

The only folder that imports a teacher, ray or diffusers. Imports `olavlm`, nothing of `train` or `pipelines`.
"""
