"""Suites of tasks: where the rows come from, how they become arrays, and how they are batched.

Nothing here knows of models or merging methods. `suites.load_suite` is the entry; `batches` feeds every loop. Rows come
through `sources` (folders, Parquet, JSON lines, tensorflow-datasets), as `clip_suites` and `glue` (published),
`described` (a user's file), or the sets of PyPI packages say; images stay encoded until they are asked for (`lazy`).
"""
