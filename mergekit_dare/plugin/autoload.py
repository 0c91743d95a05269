"""The import hook that gives mergekit the entry points it does not have.

Python's start-up files call :func:`install`, in every process. All it does is to wait for
``mergekit.merge_methods``: right after that module has been executed, and never before,
:func:`mergekit_dare.register` puts the methods of the entry-point group in place. The hook stays
after that, for a program may forget mergekit and import it anew.

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
    from typing import Any

HOST_MODULE = "mergekit.merge_methods"
SWITCH = "MERGEKIT_DARE"

_seen: "ModuleType | None" = None  # the last host module with which we register or have done so


def is_switched_off() -> bool:
    """Tell whether the environment variable ``MERGEKIT_DARE`` turns the plugin off."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "no", "off")


def install() -> None:
    """Register our methods whenever mergekit has been imported; do nothing until then.

    May be called any number of times, before or after mergekit is imported.
    """
    if is_switched_off():
        return
    if not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HostFinder())
    _catch_up()


class _HostFinder:
    """A finder for ``mergekit.merge_methods`` alone, whose loader registers."""

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the spec that Python itself finds, with registration after its execution."""
        if fullname != HOST_MODULE:
            _catch_up()
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HostLoader(spec.loader)  # type: ignore[assignment]
        return spec


class _HostLoader:
    """A loader that registers after another one has executed the module."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def exec_module(self, module: "Any") -> None:
        global _seen
        _seen = module
        module.__loader__ = module.__spec__.loader = self._loader  # the module is as without us
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)


def _catch_up() -> None:
    """Register with a host module that another finder has found, at the next import after it.

    Needed under the hooks of typeguard, jaxtyping and slipcover: asked before ours, they answer.
    """
    global _seen
    host = sys.modules.get(HOST_MODULE)
    if host is _seen or type(host) is not type(sys):  # a look at a lazy module would load it
        return
    if not getattr(getattr(host, "__spec__", None), "_initializing", True):
        _seen = host
        _register()


def _register() -> None:
    try:
        import mergekit_dare

        mergekit_dare.register()
    except Exception as error:  # mergekit's own methods must keep working, whatever we did
        import logging

        logging.getLogger("mergekit_dare").warning(
            "mergekit-dare is not active, mergekit's own DARE methods stay in place: %s: %s",
            type(error).__name__,
            error,
        )
