"""Rules of the package layout, read off syntax trees: imports between layers, file lengths."""

import ast
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p for top in ("longlive_jax", "pallas_kernels", "configs") for p in (ROOT / top).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FLOORS = {
    "pallas_kernels": 0,
    **{f"longlive_jax.{n}": 1 for n in ("captions", "typing", "spec")},
    **{f"longlive_jax.{n}": 2 for n in ("layout", "diffusion", "parallel", "quant")},
    "longlive_jax.models": 3,
    "longlive_jax.io": 4,
    **{f"longlive_jax.{n}": 5 for n in ("interop", "data")},
    "longlive_jax.adapters": 6,
    "longlive_jax.sampling": 7,
    "longlive_jax.training": 8,
    **{f"longlive_jax.{n}": 9 for n in ("planning", "small_world")},
    "longlive_jax.bench": 10,
    **{f"longlive_jax.{n}": 11 for n in ("cli", "__main__")},
}
KERNEL_IMPORTS = {"jax", "numpy", "ml_dtypes", "jaxtyping", "flax", "pallas_kernels"}
TOP = 11
READS_ENVIRONMENT = ("longlive_jax.cli", "longlive_jax.bench", "longlive_jax.planning")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 45


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute names a file imports, wherever in it, with line numbers."""
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = name_of(path).split(".")
                base = ".".join(filter(None, [*home[: len(home) - node.level], base]))
            names += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return names


def home_of(name: str) -> str | None:
    """The package of the floor table that a dotted name belongs to."""
    for length in (2, 1):
        prefix = ".".join(name.split(".")[:length])
        if prefix in FLOORS:
            return prefix
    return None


def complaints(path: Path) -> list[str]:
    me = name_of(path)
    home, out = home_of(me), []
    for name, line in imports(path):
        other, place = home_of(name), f"{me}:{line} imports {name}"
        top = name.split(".")[0]
        if home == "pallas_kernels" and top not in KERNEL_IMPORTS | set(sys.stdlib_module_names):
            out.append(f"{place}: kernels use arrays only")
        if home == "pallas_kernels" and top == "flax" and not name.startswith("flax.struct"):
            out.append(f"{place}: of flax, kernels use flax.struct only")
        if home is None or other is None or other == home:
            continue
        if FLOORS[other] > FLOORS[home]:
            out.append(f"{place}: floor {FLOORS[home]} reaches up to floor {FLOORS[other]}")
        if FLOORS[other] == FLOORS[home] != TOP:
            out.append(f"{place}: packages of one floor do not import each other")
    return out


def test_every_package_has_a_floor():
    homeless = [name_of(p) for p in SOURCES if p.parts[len(ROOT.parts)] != "configs"]
    homeless = [n for n in homeless if home_of(n) is None and n != "longlive_jax.__init__"]
    assert not homeless, f"give these a floor: {homeless}"


def test_imports_go_down():
    wrong = [c for p in SOURCES for c in complaints(p)]
    assert not wrong, "\n".join(wrong)


def test_only_commands_know_the_small_world():
    """The library works without it."""
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path in SOURCES
        for name, line in imports(path)
        if name.startswith("longlive_jax.small_world")
        and not name_of(path).startswith(("longlive_jax.small_world", "longlive_jax.cli"))
    ]
    assert not wrong, wrong


def modules_imported(path: Path) -> set[str]:
    """Modules of this project that a file imports, wherever in it."""
    known = {name_of(p).removesuffix(".__init__") for p in SOURCES}
    names = (name for name, _ in imports(path))
    return {name if name in known else name.rpartition(".")[0] for name in names} & known


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others (Tarjan's components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name] & graph.keys():
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                components.append(sorted(group))

    for name in graph:
        if name not in order:
            visit(name)
    return components


def test_no_circles():
    """Between modules, imports for annotations and inside functions included."""
    graph = {name_of(p).removesuffix(".__init__"): modules_imported(p) for p in SOURCES}
    assert not (cycles := circles(graph)), cycles


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]


def test_configs_import_ml_collections_only():
    allowed = set(sys.stdlib_module_names) | {"ml_collections", "configs"}
    for path in SOURCES:
        if name_of(path).startswith("configs"):
            wrong = [n for n, _ in imports(path) if n.split(".")[0] not in allowed]
            assert not wrong, f"{path.name} imports {wrong}"


def test_config_dicts_stop_at_the_command_line():
    wrong = [
        f"{name_of(p)}:{line}"
        for p in SOURCES
        for name, line in imports(p)
        if name.startswith("ml_collections")
        and not name_of(p).startswith(("longlive_jax.cli", "configs"))
    ]
    assert not wrong, wrong


def test_nothing_needs_pytorch_or_unpickles():
    """`pickletools` reads opcodes without running them, so it alone is allowed."""
    banned = ("torch", "pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    wrong = [
        f"{name_of(p)}:{line} imports {name}"
        for p in SOURCES
        for name, line in imports(p)
        if name.split(".")[0] in banned
    ]
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                value = node.value
                if not isinstance(value, ast.Constant) or value.value is not False:
                    wrong.append(f"{name_of(path)}:{value.lineno} allows pickles")
    assert not wrong, wrong


def test_no_bare_except_and_no_environment_switches():
    wrong = []
    for path in SOURCES:
        outside = not name_of(path).startswith(READS_ENVIRONMENT)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{name_of(path)}:{node.lineno} bare except")
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            if reads and outside:
                wrong.append(f"{name_of(path)}:{node.lineno} reads the environment")
    assert not wrong, wrong


def test_files_are_short():
    lengths = {p: len(p.read_text().splitlines()) for p in (*SOURCES, *TESTS)}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines, split by job: {long}"


def test_functions_are_short():
    """Docstrings included."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        (f"{name_of(p)}.{node.name}", length)
        for p in SOURCES
        for node in ast.walk(tree(p))
        if isinstance(node, functions)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, f"over {MAX_FUNCTION_LINES} lines: {long}"


def test_no_catch_all_modules():
    names = ("utils", "util", "common", "helpers", "misc")
    wrong = [name_of(p) for p in SOURCES if p.stem in names]
    assert not wrong, wrong
