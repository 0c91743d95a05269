"""The models of a config: their files, here or on the hub, what they say, and the rules on them.

Reads headers, settings and tokenizers, but no weights. May import ``config``, ``findings`` and
``rules``, and no other room of ``diagnostics``.
"""
