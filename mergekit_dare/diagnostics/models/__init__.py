"""The models of a config: their files, here or on the hub, what these say, and the rules on them.

Reads headers, settings and tokenizers, and no weight. May import ``config``, ``findings`` and
``rules``, and no other room of ``diagnostics``.
"""
