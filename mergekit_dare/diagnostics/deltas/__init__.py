"""The deltas themselves: excerpts of the weights, statistics, the verdict and the watch.

May import ``plan``, ``models``, ``config`` and ``findings``, and no other room of ``diagnostics``.
"""
