"""The rules of the house (docs/architecture.md), read off the source: who may import whom, and who must not ask."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "disaggd"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

GROUND = {"clock", "least_squares", "ids", "errors", "sampling", "units", "config", "toml_file", "log", "prefix", "__init__"}
GROUND |= {"pulse", "api_keys", "tls", "troubles", "wire", "open_files"}
ROOF = {"cli", "launch", "supervisor", "describe", "solo", "rank_check", "trace", "waterfall", "doctor", "router_client", "__main__"}

MAY_IMPORT = {
    "ground": set[str](),
    "kernels": set[str](),
    "model": {"kernels", "transfer"},
    "transfer": {"model"},
    "engine": {"model", "transfer", "kernels"},
    "cluster": {"model", "transfer"},
    "observe": set[str](),
    "gateway": {"model", "observe"},
    "roles": {"gateway", "cluster", "engine", "observe", "model", "transfer"},
    "simulator": {"roles", "cluster", "engine", "observe", "model", "transfer"},
    "roof": {"simulator", "roles", "gateway", "cluster", "engine", "observe", "model", "transfer"},
}
"""Each floor may import itself, the ground, and these. `model` and `transfer` share the KV layout."""

HOMES = {
    "nixl": ("transfer/agent.py",),
    "nixl_cu12": ("transfer/agent.py",),
    "nixl_cu13": ("transfer/agent.py",),
    "triton": ("kernels/",),
    "torch": ("engine/", "model/", "kernels/"),
    "safetensors": ("model/",),
    "transformers": (),
    "starlette": ("roles/", "gateway/"),
    "uvicorn": ("roles/", "gateway/"),
    "uvloop": ("roles/",),
    "websockets": ("cluster/link.py", "cluster/strangers.py"),
    "tokenizers": ("gateway/",),
    "jinja2": ("gateway/",),
    "prometheus_client": ("observe/", "roles/"),
    "click": ("cli.py",),
    "rich": ("log.py", "describe.py", "trace.py", "waterfall.py", "doctor.py", "simulator/table.py"),
}
"""Third-party names, and the only places that may know them."""

LAZY_IMPORTS = ("cli.py", "kernels/__init__.py")
"""May import inside functions: the role, which needs its environment first, and the kernels of one device."""

ROLE_WORDS = {"is_prefill", "is_decode", "is_router", "node_role", "my_role"}
ROLE_NAMES = {"prefill", "decode", "router"}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = ("disaggd", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> str:
    """The floor of `disaggd.x.y`."""
    room = [*module.split("."), "__init__"][1]
    if room in GROUND:
        return "ground"
    return "roof" if room in ROOF else room


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from names if any(name in module_names() for name in names) else [node.module]


@cache
def module_names() -> frozenset[str]:
    return frozenset(module_name(path) for path in MODULES)


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(tree(path)) for name in imported(node)}


def inside(path: Path) -> set[str]:
    """Modules of disaggd that `path` imports."""
    return {name for name in imports(path) if name.split(".")[0] == "disaggd"}


every_module = pytest.mark.parametrize("path", MODULES, ids=place)


@every_module
def test_imports_run_down(path: Path) -> None:
    here = floor(module_name(path))
    allowed = MAY_IMPORT[here] | {here, "ground"}
    assert {name for name in inside(path) if floor(name) not in allowed} == set()


@every_module
def test_a_third_party_name_has_one_home(path: Path) -> None:
    strangers = {name.split(".")[0] for name in imports(path)} & HOMES.keys()
    assert {name for name in strangers if not place(path).startswith(HOMES[name] or "nowhere")} == set()


@every_module
def test_imports_stand_at_the_top(path: Path) -> None:
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    lazy = {name for function in functions for node in ast.walk(function) for name in imported(node)}
    assert place(path) in LAZY_IMPORTS or lazy == set()
    assert place(path) == "cli.py" or "importlib" not in {name.split(".")[0] for name in imports(path)}


@every_module
def test_a_module_has_one_idea_and_says_it(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert path.name == "__init__.py" or ast.get_docstring(tree(path))


@every_module
def test_below_the_roles_nothing_asks_which_role_it_serves(path: Path) -> None:
    if floor(module_name(path)) in ("ground", "roles", "roof"):
        return  # the file's own words for roles, their homes, and those who start them
    names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    assert names & ROLE_WORDS == set()
    assert [place(path) + f":{node.lineno}" for node in ast.walk(tree(path)) if asks_for_a_role(node)] == []


def asks_for_a_role(node: ast.AST) -> bool:
    """`x == "prefill"`, `x in ("prefill", …)`, `case "prefill"`."""
    if isinstance(node, ast.Compare):
        return any(
            isinstance(part, ast.Constant) and part.value in ROLE_NAMES
            for side in (node.left, *node.comparators)
            for part in ast.walk(side)
        )
    return isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant) and node.value.value in ROLE_NAMES


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module_name(path): inside(path) & module_names() for path in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name] - {"disaggd"}):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", ["disaggd.roles.router", "disaggd.cli"])
def test_a_router_process_has_no_torch(module: str) -> None:
    program = f"import sys, {module}; print([name for name in ('torch', 'transformers', 'nixl') if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "[]\n", "")
