"""A config: a document with lines, the rules on it, and what mergekit itself says about it.

Reads no model's file. May import ``findings`` and ``rules``, and no other room of ``diagnostics``.
"""
