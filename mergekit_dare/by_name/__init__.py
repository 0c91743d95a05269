"""Merging every tensor by its name: a whole model in one new folder, whatever the architecture.

The plan is that of ``diagnostics.plan.by_name``; the tasks, the executor and the writer are
mergekit's.
"""
