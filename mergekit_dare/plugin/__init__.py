"""What mergekit and Python's start-up see: the import hook, the registration, the merge methods.

Imports the wing ``kernel``, never ``diagnostics``. At start-up it imports only the standard
library.
"""
