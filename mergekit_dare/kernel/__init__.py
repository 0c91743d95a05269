"""The arithmetic of DARE on plain tensors.

Imports torch, NumPy, Numba and the standard library; nothing of mergekit or of another wing.
"""
