"""Putting the merge methods of the entry-point group into mergekit's registry.

The group is ``mergekit.merge_methods``. Each entry point has the name that the method has in a
config, and refers to a ``mergekit.merge_methods.MergeMethod``. A method with the name of one of
mergekit's own replaces it: existing configs benefit without an edit.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

import mergekit_dare
from mergekit_dare.plugin import autoload

GROUP = "mergekit.merge_methods"
OURS = ("dare_linear", "dare_ties")
METHODS_MODULE = "mergekit_dare.plugin.methods"
OLDEST_MERGEKIT = (0, 1, 5)

LOG = logging.getLogger("mergekit_dare")

_deferred = False


def register() -> bool:
    """Register every method of the entry-point group; see :func:`mergekit_dare.register`."""
    global _deferred
    if autoload.is_switched_off():
        LOG.warning(
            "mergekit-dare is switched off by %s in the environment: mergekit's own DARE "
            "methods stay in place",
            autoload.SWITCH,
        )
        return False
    import mergekit.merge_methods  # noqa: F401  (after this import, its registry is complete)

    if (problem := _host_problem()) is not None:
        LOG.warning(
            "mergekit-dare is not active, so mergekit's own DARE methods stay in place: %s", problem
        )
        return False
    _deferred = False
    done = [_register_entry_point(entry_point) for entry_point in _entry_points()]
    return all(done)


def finish_deferred() -> None:
    """Register now, if a registration found ``mergekit_dare.plugin.methods`` half imported.

    In a program that imports that module first, the module imports mergekit, which triggers the
    import hook, which needs that very module. The module calls this function on its last line.
    """
    if _deferred:
        mergekit_dare.register()


def is_active() -> bool:
    """Tell whether mergekit has been imported and returns our methods."""
    get = getattr(sys.modules.get(autoload.HOST_MODULE), "get", None)
    try:
        return get is not None and all(type(get(n)).__module__ == METHODS_MODULE for n in OURS)
    except RuntimeError:  # it has no such method
        return False


def _entry_points() -> list[EntryPoint]:
    """Return ours, even where no metadata is installed (PYTHONPATH), then other packages'."""
    ours = [EntryPoint(name, f"{METHODS_MODULE}:{name}", GROUP) for name in OURS]
    others = [point for point in entry_points(group=GROUP) if point.name not in OURS]
    return ours + sorted(others, key=lambda point: (point.name, point.value))


def _register_entry_point(entry_point: EntryPoint) -> bool:
    global _deferred
    if _is_half_imported(entry_point):
        if entry_point.name in OURS:
            _deferred = True
        else:
            LOG.warning(
                "mergekit-dare cannot register %s yet: %s was imported before mergekit; "
                "import mergekit.merge_methods first",
                entry_point.name,
                entry_point.module,
            )
        return False
    try:
        method = _load(entry_point)
        if method.spec.name != entry_point.name:
            raise ValueError(f"the method's own name is {method.spec.name!r}")
        _replace(method)
    except (Exception, SystemExit) as error:  # a broken plugin must not break the others
        LOG.warning(
            "mergekit-dare could not register the merge method %s from %s: %s: %s",
            entry_point.name,
            entry_point.value,
            type(error).__name__,
            error,
        )
        return False
    return True


def _load(entry_point: EntryPoint) -> Any:
    """Load a method, again if it was made by a mergekit that the process has since unloaded."""
    from mergekit import merge_methods

    method = entry_point.load()
    kind = getattr(merge_methods, "MergeMethod", None)
    if kind is None or isinstance(method, kind):
        return method
    importlib.reload(sys.modules[entry_point.module])
    return entry_point.load()


def _is_half_imported(entry_point: EntryPoint) -> bool:
    module = sys.modules.get(entry_point.module)
    initializing = getattr(getattr(module, "__spec__", None), "_initializing", False)
    return bool(initializing) and not hasattr(module, entry_point.attr)


def _replace(method: Any) -> None:
    """Register ``method``, in place of mergekit's own of that name if there is one.

    mergekit 0.1.5 has no public call that replaces a method. This is the one place where we
    touch its private registry.
    """
    from mergekit.merge_methods import registry

    registry._METHODS[method.spec.name] = method
    if registry.get(method.spec.name) is not method:
        raise RuntimeError("mergekit's registry did not accept it; this mergekit may be too new")


def _host_problem() -> str | None:
    """Say in one sentence why this mergekit cannot use our methods, or return ``None``."""
    try:
        found = version("mergekit")
    except PackageNotFoundError:  # a source tree on PYTHONPATH; its registry decides
        found = None
    if found is not None and is_too_old(found):
        return (
            f"mergekit {found} is too old; "
            f"upgrade with: pip install --upgrade 'mergekit>={_dotted(OLDEST_MERGEKIT)}'"
        )
    from mergekit.merge_methods import registry

    if not isinstance(getattr(registry, "_METHODS", None), dict):
        return (
            f"mergekit {found} keeps its methods where mergekit-dare cannot find them; "
            "upgrade mergekit-dare"
        )
    return None


def is_too_old(mergekit_version: str) -> bool:
    """Tell whether a version of mergekit is older than all that we support."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", mergekit_version)[:3])
    return numbers < OLDEST_MERGEKIT


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
