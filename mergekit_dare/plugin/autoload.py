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

HOST_MODULE = "mergekit.merge_methods"
SWITCH = "MERGEKIT_DARE"


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
    host = sys.modules.get(HOST_MODULE)
    if host is not None and not _is_executing(host):
        _register()


class _HostFinder:
    """A finder for ``mergekit.merge_methods`` alone, which sees every execution of it."""

    def __init__(self) -> None:
        self._seen: ModuleType | None = None

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders find, with registration after its execution."""
        try:
            if sys.meta_path[0] is not self:  # another hook would answer before this one
                self._move_to_front()
            host = sys.modules.get(HOST_MODULE)
            if host is None:
                self._seen = None
            elif host is not self._seen:
                self._catch_up(host)
        except Exception as error:
            _warn(f"{type(error).__name__}: {error}")
        if fullname != HOST_MODULE:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                self._follow(spec)
                return spec
        return None

    def _move_to_front(self) -> None:
        if self in sys.meta_path:  # else somebody has taken it out, on purpose
            sys.meta_path.remove(self)
            sys.meta_path.insert(0, self)

    def _catch_up(self, host: "ModuleType") -> None:
        """Register with a module that another finder has found, and that this one did not see."""
        self._seen = host
        spec = host.__spec__
        if spec is None or not _is_executing(host):
            _register()
            return

        # It is being executed now. Python says so in the spec, and takes that back at the end.
        kind = type(spec)

        class Followed(kind):  # type: ignore[misc, valid-type]
            @property
            def _initializing(self) -> bool:
                return True

            @_initializing.setter
            def _initializing(self, executing: bool) -> None:
                self.__class__ = kind  # type: ignore[assignment]
                self._initializing = executing
                if not executing and sys.modules.get(HOST_MODULE) is host:  # else it failed
                    _register()

        del spec._initializing  # type: ignore[attr-defined]
        spec.__class__ = Followed

    def _follow(self, spec: "ModuleSpec") -> None:
        """Register after the execution of the module that is loaded from ``spec``."""
        loader = spec.loader
        if loader is None:
            return
        exec_module = loader.exec_module

        def exec_module_and_register(module: "ModuleType") -> None:
            vars(loader).pop("exec_module", None)
            if module.__name__ != HOST_MODULE:  # a loader of many modules
                exec_module(module)
                return
            self._seen = module
            exec_module(module)
            _register()

        try:
            loader.exec_module = exec_module_and_register  # type: ignore[method-assign]
        except AttributeError:  # a loader without attributes of its own
            _warn(f"{type(loader).__name__} cannot be followed; call mergekit_dare.register()")


def _is_executing(module: "ModuleType") -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _register() -> None:
    try:
        import mergekit_dare

        mergekit_dare.register()
    except Exception as error:  # mergekit's own methods must keep working, whatever we did
        _warn(f"{type(error).__name__}: {error}")


def _warn(reason: str) -> None:
    import logging

    logging.getLogger("mergekit_dare").warning(
        "mergekit-dare is not active, mergekit's own DARE methods stay in place: %s", reason
    )
