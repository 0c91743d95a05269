"""The commands of ``mergekit-dare``, one module each: only options, output and exit codes.

What they report is found out in ``diagnostics``.
"""
