"""Docstrings of Python code, read without running it.

Source files are parsed with `ast`; only the standard library's C modules, which have no source, are
imported and asked with `inspect`. Uses the standard library alone and imports nothing of llmpipe, so that
`pydocs.py` can run this file as a script, isolated, in as many processes as there are cores, whether or
not torch is loaded in the parent. One line of JSON comes in (the jobs of this process), one line a
docstring goes out.

A docstring is a list `[name, kind, signature, docstring]`; kind is "module", "class", "function", "method"
or "topic"; the signature is "" where there is none.
"""

import ast
import contextlib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

NATIVE_TYPES = {
    "builtin_function_or_method",
    "method_descriptor",
    "classmethod_descriptor",
    "getset_descriptor",
}

# C modules of the standard library and the name their contents are known by. Platform and build options
# decide over ssl, sqlite3, readline and the like: those are left out, so that every build harvests the same.
C_MODULES = {
    "builtins": "",
    "_abc": "abc",
    "_asyncio": "asyncio",
    "_bisect": "bisect",
    "_codecs": "codecs",
    "_collections": "collections",
    "_contextvars": "contextvars",
    "_csv": "csv",
    "_datetime": "datetime",
    "_decimal": "decimal",
    "_functools": "functools",
    "_heapq": "heapq",
    "_io": "io",
    "_json": "json",
    "_operator": "operator",
    "_pickle": "pickle",
    "_random": "random",
    "_signal": "signal",
    "_socket": "socket",
    "_sre": "re",
    "_statistics": "statistics",
    "_struct": "struct",
    "_symtable": "symtable",
    "_thread": "threading",
    "_tracemalloc": "tracemalloc",
    "_weakref": "weakref",
    "array": "array",
    "atexit": "atexit",
    "binascii": "binascii",
    "cmath": "cmath",
    "errno": "errno",
    "faulthandler": "faulthandler",
    "gc": "gc",
    "itertools": "itertools",
    "marshal": "marshal",
    "math": "math",
    "posix": "os",
    "pyexpat": "xml.parsers.expat",
    "select": "select",
    "sys": "sys",
    "time": "time",
    "types": "types",
    "unicodedata": "unicodedata",
    "zlib": "zlib",
}

# Modules that implement a public one, by the name people import.
PUBLIC = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_strptime": "time",
    "numpy._core": "numpy",
    "numpy._core.multiarray": "numpy",
    "numpy._core.umath": "numpy",
}

Docstring = list[str]


def from_source(source: bytes, module: str) -> Iterator[Docstring]:
    """The docstrings of one source file, in its order; nothing if it is not Python this interpreter reads.

    Private classes and functions (a leading underscore, special methods too) and everything inside functions
    are left out; so are undocumented things. Module-level `if` and `try` blocks are looked into.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    name = PUBLIC.get(module, module)
    if doc := ast.get_docstring(tree):
        yield [name, "module", "", doc]
    yield from _walk(tree.body, name, in_class=False)


def _walk(body: list[ast.stmt], prefix: str, in_class: bool) -> Iterator[Docstring]:
    for node in body:
        if isinstance(node, ast.If):
            yield from _walk(node.body + node.orelse, prefix, in_class)
        elif isinstance(node, ast.Try):
            rest = [statement for handler in node.handlers for statement in handler.body]
            yield from _walk(node.body + rest + node.orelse, prefix, in_class)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _added(node.value)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("_"):
                continue
            name, doc = f"{prefix}.{node.name}", ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                if doc:
                    yield [name, "class", "", doc]
                yield from _walk(node.body, name, in_class=True)
            elif doc:
                yield [name, "method" if in_class else "function", _signature(node), doc]


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def _added(call: ast.Call) -> Iterator[Docstring]:
    """What numpy and torch say of C functions: `add_newdoc(module, name, doc)`, `add_docstr(name, doc)`."""
    if not isinstance(call.func, ast.Name) or not call.args:
        return
    if call.func.id == "add_newdoc" and len(call.args) == 3:
        module, owner = _text(call.args[0]), _text(call.args[1])
        prefix = f"{PUBLIC.get(module, module)}.{owner}"
        last = call.args[2]
        if isinstance(last, ast.Tuple) and len(last.elts) == 2:
            yield _native(f"{prefix}.{_text(last.elts[0])}", "method", _text(last.elts[1]))
        else:
            yield _native(prefix, "function", _text(last))
    elif call.func.id == "add_docstr" and len(call.args) == 2:
        name = ast.unparse(call.args[0]).replace("torch._C._", "torch.")
        yield _native(name, "function", _text(call.args[1]))
    elif call.func.id == "add_docstr_all" and len(call.args) == 2:
        yield _native(f"torch.Tensor.{_text(call.args[0])}", "method", _text(call.args[1]))


def _text(node: ast.expr) -> str:
    """The string an expression of literals, `+` and `.format(...)` is about to be; fields stay unfilled."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _text(node.func.value)
    return ""


def _native(name: str, kind: str, doc: str) -> Docstring:
    """A C function's entry: its docstring may start with its signature, alone or with a text behind it.

    `abs(x, /)\n\nReturn ...`, `abs(x, /)\n--\n\nReturn ...` and `D.pop(k) -> v, remove the key ...` are
    the three customs.
    """
    doc, leaf = inspect.cleandoc(doc), re.escape(name.rsplit(".", 1)[-1])
    head, _, rest = doc.partition("\n\n")
    found = re.match(rf"(?:[\w.]+\.)?{leaf}\s*(\(.*?\)(?:\s*->\s*[\w\[\], ]+(?:\.\w+)*)?)(.*)", head, re.S)
    if not found:
        return [name, kind, "", doc]
    signature, behind = " ".join(found[1].split()), found[2].strip(" -:,.>\n")
    if behind.startswith("("):  # what it returns
        signature, behind = f"{signature} -> {behind}", ""
    if behind and not behind.startswith(found[0].split("(")[0]):
        rest = f"{behind[0].upper()}{behind[1:]}\n\n{rest}"
    return [name, kind, signature, rest.strip()]


def from_c_modules() -> Iterator[Docstring]:
    """The docstrings of the standard library's C functions, classes and methods, modules in fixed order."""
    for imported, public in C_MODULES.items():
        module = importlib.import_module(imported)
        if public and module.__doc__:
            yield [public, "module", "", inspect.cleandoc(module.__doc__)]
        yield from _members(module, public)


def _members(module: ModuleType, public: str) -> Iterator[Docstring]:
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or not isinstance(value.__doc__, str):
            continue
        name = f"{public}.{key}".lstrip(".")
        if isinstance(value, type):
            yield _native(name, "class", value.__doc__)
            for member, inner in sorted(vars(value).items()):
                if not member.startswith("_") and isinstance(inner.__doc__, str) and _is_native(inner):
                    yield _with_signature(f"{name}.{member}", "method", inner)
        elif _is_native(value):
            yield _with_signature(name, "function", value)


def _is_native(value: object) -> bool:
    return type(value).__name__ in NATIVE_TYPES


def _with_signature(name: str, kind: str, value: object) -> Docstring:
    entry = _native(name, kind, value.__doc__ or "")
    # Not all of them have one, and some name a default that cannot be looked up (3.13's `select.epoll.register`).
    with contextlib.suppress(TypeError, ValueError, AttributeError, NameError):
        entry[2] = entry[2] or str(inspect.signature(value))  # type: ignore[arg-type]
    return entry


def topics() -> Iterator[Docstring]:
    """The language reference as `help()` shows it (`pydoc_data.topics`)."""
    table: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(table.items()):
        yield [name, "topic", "", inspect.cleandoc(text)]


def read(jobs: list[list[str]]) -> Iterator[Docstring]:
    """The docstrings of `[path, module]` jobs, in their order; path "" is the C modules and the topics."""
    for path, module in jobs:
        if path:
            with open(path, "rb") as file:
                yield from from_source(file.read(), module)
        else:
            yield from from_c_modules()
            yield from topics()


if __name__ == "__main__":
    for docstring in read(json.loads(sys.stdin.readline())):
        print(json.dumps(docstring))
