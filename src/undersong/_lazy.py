"""Packages whose names are imported when they are first used."""

import importlib


def lazy_names(package, modules):
    """`__all__` and `__getattr__` of a package.

    Args:
        modules: module, relative to the package -> the names it gives. No name may be that of a module: after its
            import the package's attribute would be the module.
    """
    home = {name: module for module, names in modules.items() for name in names}

    def get(name):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{home[name]}", package), name)

    return sorted(home), get
