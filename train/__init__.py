"""The lean side: trains the student from stored targets, and probes it.

What lives here: the pinned snapshot, the sample order, the loader, the step, checkpoints, the stages.
What may not: featurize, ray, diffusers, a teacher. A test blocks them.

Read in this order: `order` → `snapshot` → `loader` → `step` → `checkpoint` → `stage`.
"""
