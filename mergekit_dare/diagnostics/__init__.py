"""Know before, while and after you merge: what is found out, by subject.

``config``, ``models``, ``plan`` and ``deltas`` are rooms of which each uses those before it. Above
them: ``checking`` runs the rules of all, ``suggestion`` writes a config, ``verification`` merges
again. May import the wings ``plugin`` and ``kernel``, which never import this one; what a user
reads and which exit code it is lies in ``commands``. Nothing here is imported at Python's start-up.
"""
