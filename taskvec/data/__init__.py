"""Suites of tasks: where the rows come from, how they become arrays, and how they are batched.

Nothing here knows of models or merging methods. `suites.load_suite` is the entry; `batches` feeds every loop.
"""
