"""DARE (Drop And REscale, arXiv 2311.03099) for mergekit.

Installing this package is enough: ``mergekit-yaml`` and every other process that imports
mergekit then uses these ``dare_linear`` and ``dare_ties`` in place of mergekit's own.
Where start-up files do not run (``PYTHONPATH``, ``pip install --target``), call
:func:`register` or use ``python -m mergekit_dare yaml CONFIG OUT``.

Importing this package imports neither torch nor mergekit.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "register"]


def register() -> bool:
    """Make this package's ``dare_linear`` and ``dare_ties`` mergekit's methods of those names.

    Imports mergekit. May be called any number of times.

    Returns:
        Whether the methods are in use. ``False``, with one logged warning, if the
        environment variable ``MERGEKIT_DARE`` is ``0``, if mergekit is older than 0.1.5, or
        if a method could not be loaded; mergekit's own methods then stay in place.

    Raises:
        ImportError: mergekit is not installed.

    """
    from mergekit_dare.plugin import registration

    registered = registration.register()
    if registration.is_active():
        from mergekit_dare.diagnostics.deltas import range_watch
        from mergekit_dare.diagnostics.plan import loss_watch
        from mergekit_dare.plugin import methods

        methods.observe(range_watch.WATCH.look)
        methods.observe_plan(loss_watch.WATCH.note)
        methods.observe(loss_watch.WATCH.look)
    return registered
