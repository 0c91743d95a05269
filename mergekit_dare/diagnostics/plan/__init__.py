"""What mergekit will do with a config and its models: its own plan, and the rules on that.

Reads no weight, but for a task that its caller asks to load. May import ``models``, ``config``,
``findings`` and ``rules``, and no other room of ``diagnostics``.
"""
