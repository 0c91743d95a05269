"""What mergekit will do with a config and its models: its own plan, and the rules on it.

Reads no weights, except for a task that the caller asks to load. May import ``models``, ``config``,
``findings`` and ``rules``, and no other room of ``diagnostics``.
"""
