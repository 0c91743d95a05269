"""Know before, while and after you merge: check, inspect, doctor, and the watch while merging.

May import the wings ``plugin`` and ``kernel``, which never import this one; nothing here is
imported at Python's start-up.
"""
