"""Know before, while and after you merge: what can be found out, by subject.

``config``, ``models``, ``plan`` and ``deltas`` are rooms, each of which uses those before it. Above
them, ``checking`` runs the rules of all rooms, ``suggestion`` writes a config, and ``verification``
merges again. May import the wings ``plugin`` and ``kernel``, which never import this one; the
commands' output and exit codes are in ``commands``. Nothing here is imported when Python starts.
"""
