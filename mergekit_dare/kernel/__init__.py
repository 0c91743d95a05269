"""The arithmetic of DARE on plain tensors.

Imports torch and the standard library: nothing of mergekit, of a config or of another wing.
"""
