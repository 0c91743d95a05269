"""The arithmetic of DARE on plain tensors.

Imports torch, Numba and the standard library: nothing from mergekit, a config or another wing.
"""
