"""The import hook that gives mergekit the entry points it does not have.

Python's start-up files call :func:`install`, in every process. All it does is to wait for
``mergekit.merge_methods``: right after that module has been imported, and never before,
``mergekit_dare.registration`` puts the methods of the entry-point group in place.

This module runs at each start of Python, so it imports nothing but what Python itself has
already loaded, and nothing that goes wrong in it may break an import.
"""

import os
import sys

TYPE_CHECKING = False  # as in typing, which would cost milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

HOST_MODULE = "mergekit.merge_methods"
SWITCH = "MERGEKIT_DARE"


def is_switched_off() -> bool:
    """Tell whether the environment variable ``MERGEKIT_DARE`` turns the plugin off."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "no", "off")


def install() -> None:
    """Register our methods as soon as mergekit is imported; do nothing until then.

    May be called any number of times, before or after mergekit is imported.
    """
    if is_switched_off():
        return
    if HOST_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HostFinder())


class _HostFinder:
    """A finder for ``mergekit.merge_methods`` alone, which removes itself when it has fired."""

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders find, with registration after its execution."""
        if fullname != HOST_MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _register_after(spec)
        return spec


def _register_after(spec: "ModuleSpec") -> None:
    loader = spec.loader
    assert loader is not None
    exec_module = loader.exec_module

    def exec_module_and_register(module: "ModuleType") -> None:
        del loader.exec_module
        exec_module(module)
        _register()

    try:
        loader.exec_module = exec_module_and_register  # type: ignore[method-assign]
    except AttributeError:  # a loader without attributes of its own
        _warn(f"{type(loader).__name__} cannot be followed; call mergekit_dare.register()")


def _register() -> None:
    try:
        from mergekit_dare import registration

        registration.register()
    except Exception as error:  # mergekit's own methods must keep working, whatever we did
        _warn(f"{type(error).__name__}: {error}")


def _warn(reason: str) -> None:
    import logging

    logging.getLogger("mergekit_dare").warning(
        "mergekit-dare is not active, mergekit's own DARE methods stay in place: %s", reason
    )
