"""The commands of ``mergekit-dare``, one module each: options, words and exit codes, nothing else.

What they tell is found out in ``diagnostics``.
"""
