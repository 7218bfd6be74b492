"""The source files a class needs, as flat siblings that transformers' remote-code loader can follow.

The loader knows two line forms, `from .name import ...` and `import .name`. So every module of ours that a class
reaches through its imports becomes one file beside the others, and only its import statements are rewritten; the
rest of the text stays as it is. What cannot be said in that form is refused, because it would fail on the reader's
machine.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# What a machine with transformers and torch has. The loader demands every other import outside a `try` block.
_ALWAYS_THERE = sys.stdlib_module_names | {
    "huggingface_hub",
    "numpy",
    "packaging",
    "regex",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "yaml",
}
# These look for optional files beside themselves, and work when there are none.
_MAY_USE_FILE = {"undersong.ops._dispatch"}
_OWN_PLACE = ("__file__", "__package__", "__path__")
_KEEP_NAME = ("configuration_", "modeling_", "tokenization_", "processing_", "image_processing_")

_FROM_HEADER = re.compile(r"from[\s\\]+[.\w]+[\s\\]+import\b")
_LOADER_FORMS = (
    re.compile(r"^\s*import\s+\.(\S+)\s*$", re.MULTILINE),
    re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE),
)


class CannotFlatten(ValueError):
    """A class or one of its imports cannot be written as flat files; the message names the line and the remedy."""


@dataclass(frozen=True)
class Closure:
    """`files`: file name -> text. `names`: module name -> name of its flat file without `.py`."""

    files: dict[str, str]
    names: dict[str, str]

    def holds(self, cls):
        """Whether the class travels with the closure, or is there anyway."""
        return cls.__module__ in self.names or cls.__module__.partition(".")[0] in _ALWAYS_THERE

    def reference(self, cls):
        """`"file.Class"`, as `auto_map` names it."""
        return f"{self.names[cls.__module__]}.{cls.__name__}"


def flatten(*classes):
    """Collects the modules that the classes need and rewrites their imports to flat siblings.

    "Ours" is the package of each class, and undersong. Imports are read from the syntax tree, at the top level and
    inside functions; a name that a package only re-exports is followed to the module that defines it.

    Args:
        classes: classes defined at the top level of importable source files.

    Returns:
        A `Closure`. Two modules never share a file name.

    Raises:
        CannotFlatten: a class has no source file; an import names a module instead of something in it, is a star
            import, is computed at run time or needs a package that transformers does not bring; a module reads
            files beside itself.
    """
    for cls in classes:
        _check_class(cls)
    roots = {_root(cls.__module__) for cls in classes} | {"undersong"}
    modules, queue = {}, [cls.__module__ for cls in classes]
    while queue:
        name = queue.pop()
        if name not in modules:
            modules[name] = _Source(name, roots)
            queue.extend(modules[name].needs)
    names = _flat_names(modules, roots)
    return Closure({f"{names[name]}.py": source.rewritten(names) for name, source in sorted(modules.items())}, names)


def _check_class(cls):
    label = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__ == "__main__":
        raise CannotFlatten(
            f"class {cls.__name__} is defined in __main__, which has no importable file to export; move it to a"
            " module and import it from there."
        )
    if "<locals>" in cls.__qualname__:
        raise CannotFlatten(f"class {label} is defined inside a function; move it to the top level of a module.")
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
        raise CannotFlatten(
            f"class {label} is not what its module holds under that name; define it at the top level of a source file."
        )


def _root(module):
    # a model loaded as remote code lives in transformers_modules.<repo>.<commit>, itself a flat folder
    return module.rpartition(".")[0] if module.startswith("transformers_modules.") else module.partition(".")[0]


def _flat_names(modules, roots):
    names, taken = {}, {}
    for module in sorted(modules):
        flat = _flat_name(module, max((root for root in roots if _within(module, root)), key=len))
        # transformers copies a local folder once for the configuration and once for the model: the same file twice
        if flat in taken and modules[taken[flat]].text != modules[module].text:
            raise CannotFlatten(f"modules {taken[flat]} and {module} both become {flat}.py; rename one of them.")
        taken[flat], names[module] = module, flat
    return names


def _flat_name(module, root):
    """`undersong.ops._dispatch` -> `ops_dispatch`; the room `modeling` is left out, `modeling_x` keeps its name."""
    last = module.rpartition(".")[2]
    if last.startswith(_KEEP_NAME):
        return last
    parts = module.removeprefix(root).strip(".").split(".") if module != root else [last]
    if len(parts) > 1 and parts[0] == "modeling":
        parts = parts[1:]
    return "_".join(part.strip("_") for part in parts)


def _within(module, root):
    return module == root or module.startswith(f"{root}.")


def _find_spec(module):
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # ValueError: a module made at run time, without a spec
        return None


class _Source:
    """One module of ours: its text, its import statements, and where each imported name is defined."""

    def __init__(self, name, roots):
        self.name, self.roots = name, roots
        spec = _find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            raise CannotFlatten(f"module {name} has no Python source file; it cannot be exported.")
        self.package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        self.text = Path(spec.origin).read_text(encoding="utf-8")
        self.lines = self.text.split("\n")
        self.imports: list[tuple[ast.ImportFrom, dict[str, list[ast.alias]]]] = []
        self._visit(ast.parse(self.text), guarded=False)

    @property
    def needs(self):
        return {module for _, groups in self.imports for module in groups}

    def _refuse(self, node, problem):
        raise CannotFlatten(f"{self.name}, line {node.lineno}: {problem}")

    def _ours(self, module):
        return any(_within(module, root) for root in self.roots)

    def _visit(self, node, guarded):
        if isinstance(node, ast.ImportFrom):
            self._visit_from(node, guarded)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if self._ours(alias.name):
                    self._refuse(
                        node,
                        f"`import {alias.name}` cannot be written as a flat sibling; use `from {alias.name} import"
                        " <name>`.",
                    )
                self._check_third_party(node, alias.name, guarded)
        elif isinstance(node, ast.Call):
            self._check_call(node)
        elif isinstance(node, ast.Name) and node.id in _OWN_PLACE and self.name not in _MAY_USE_FILE:
            self._refuse(node, f"`{node.id}` points at files that an exported folder does not hold.")
        for child in ast.iter_child_nodes(node):
            self._visit(child, guarded or isinstance(node, ast.Try))

    def _check_third_party(self, node, module, guarded):
        package = module.partition(".")[0]
        if not guarded and package not in _ALWAYS_THERE:
            self._refuse(
                node,
                f"`{package}` is imported outside a try block, so the exported model would not load without it; put"
                " the import into `try: ... except ImportError: ...` or leave it out of what the model needs.",
            )

    def _check_call(self, node):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        constant = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None
        if function in ("import_module", "__import__"):
            if constant is None or constant.startswith(".") or self._ours(constant):
                self._refuse(
                    node, f"`{function}` imports at run time what export cannot follow; use `from ... import`."
                )
        elif function in ("files", "get_data") and constant is not None and self._ours(constant):
            self._refuse(node, f"`{function}({constant!r})` reads package data that an exported folder does not hold.")

    def _visit_from(self, node, guarded):
        if node.level:
            base = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            target = ".".join([*base, *([node.module] if node.module else [])])
        else:
            target = node.module
        if not self._ours(target):
            if node.level:
                self._refuse(node, f"`{self._statement(node)}` leaves the package; it cannot be exported.")
            self._check_third_party(node, target, guarded)
            return
        if node.level and not node.module:
            self._refuse(
                node,
                f"`{self._statement(node)}` imports from the package itself, which the remote-code loader does not"
                " follow; use `from .<module> import <name>`.",
            )
        if self.lines[node.lineno - 1][: node.col_offset].strip():
            self._refuse(node, f"`{self._statement(node)}` must stand on a line of its own to be seen by the loader.")
        groups: dict[str, list[ast.alias]] = {}
        for alias in node.names:
            if alias.name == "*":
                self._refuse(node, f"star import of {target}; name what is needed.")
            groups.setdefault(self._defining_module(node, target, alias.name), []).append(alias)
        self.imports.append((node, groups))

    def _statement(self, node):
        return " ".join(ast.get_source_segment(self.text, node).split())

    def _defining_module(self, node, module, name):
        """The module whose file binds `module.name`: itself, or where a package re-exports it from."""
        spec = _find_spec(module)
        if spec is None:
            self._refuse(node, f"there is no module {module}.")
        if spec.submodule_search_locations is None:
            return module
        value = getattr(importlib.import_module(module), name, None)
        if value is None and _find_spec(f"{module}.{name}") is not None:
            value = importlib.import_module(f"{module}.{name}")
        if isinstance(value, ModuleType):
            self._refuse(
                node,
                f"`{self._statement(node)}` imports the module {module}.{name}; use `from {module}.{name} import"
                " <name>`.",
            )
        home = getattr(value, "__module__", None)
        if isinstance(home, str) and self._ours(home) and getattr(sys.modules.get(home), name, None) is value:
            return home
        # a constant does not know its home; the package's own import statement does
        for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body if spec.origin else ():
            if isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        if alias.name != name:
                            self._refuse(
                                node, f"{module} renames {alias.name} to {name}; import it from its own module."
                            )
                        return self._defining_module(node, f"{module}.{statement.module}", name)
        return module

    def rewritten(self, names):
        """The text with every import of ours as `from .<flat name> import ...`."""
        lines = list(self.lines)
        for node, groups in sorted(self.imports, key=lambda pair: pair[0].lineno, reverse=True):
            first, last = node.lineno - 1, node.end_lineno - 1
            indent = lines[first][: node.col_offset]
            after = lines[last].encode()[node.end_col_offset :].decode()
            if len(groups) == 1:
                old = ast.get_source_segment(self.text, node)
                new = _FROM_HEADER.sub(f"from .{names[next(iter(groups))]} import", old, count=1)
            else:
                new = f"\n{indent}".join(
                    f"from .{names[module]} import {', '.join(ast.unparse(alias) for alias in aliases)}"
                    for module, aliases in groups.items()
                )
            lines[first : last + 1] = [indent + new + after]
        text = "\n".join(lines)
        self._check_loader_sees_the_same(text, names)
        return text

    def _check_loader_sees_the_same(self, text, names):
        expected = {names[module] for module in self.needs}
        for form in _LOADER_FORMS:
            for match in form.finditer(text):
                if match.group(1) not in expected:
                    line = text.count("\n", 0, match.start(1)) + 1
                    raise CannotFlatten(
                        f"{self.name}, near line {line}: the text `{match.group(0).strip()}` is not an import"
                        " statement, but transformers' loader reads it as one; reword it."
                    )
