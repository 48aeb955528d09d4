"""House rules that a reader relies on: imports run downwards, no circles, one idea a file, nothing machine-bound."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vfmlab"

# From the ground up; a module imports from its own floor and from those below. A new room is added here. Three modules
# stand on other floors than the rest of their room: what reads weights is below everything, what takes whole runs above.
FLOORS = [
    ["errors"],
    ["registry", "seeding", "training.events"],
    ["config"],
    ["runs", "training.progress"],
    ["nn", "weights.io", "evaluation.judge", "diffusion.path"],
    ["vfm", "decoders", "data"],
    ["losses", "presets", "tokenizers"],
    ["diffusion", "ar"],
    ["evaluation", "training", "weights"],
    ["api", "training.plan"],
    ["weights.export", "weights.pipeline", "weights.bundled", "plots.primitives"],
    ["studies", "plots", "training.open_step"],
    ["widgets", "cli"],
    ["__main__"],
]
FLOOR = {name: height for height, floor in enumerate(FLOORS) for name in floor}
MAY_PRINT = {"cli"}
ROOT_MODULES = {"__init__", "__main__", "api", "errors", "registry", "runs", "seeding"}
LONGEST, WIDEST, MOST_FLOORS = 450, 110, 15
PRIVATE_WORDS = {
    "lane", "lanes", "opponent", "opponents", "rival", "rivals", "starter", "blends", "views", "heard", "conduct",
    "found", "told", "kept", "judged",
}
STARTS_PROCESSES = {"vfmlab.studies.executor", "vfmlab.studies.cluster", "vfmlab.studies.kernels"}
ASKS_OTHERS = {"vfmlab.runs", "vfmlab.cli.doctor"}  # git, and imports that may take the process down


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
MODULES = {module_name(path): path for path in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST, lazy: bool = True):
    """All nodes but those that only a type checker sees and, without `lazy`, those inside functions."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child):
            for other in child.orelse:
                yield other
                yield from statements(other, lazy)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from statements(child, lazy)


def imports(path: Path, lazy: bool = True) -> set[str]:
    """Modules of this package that `path` imports at its head and, with `lazy`, inside functions."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vfmlab"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write the full name"
            if node.module and node.module.split(".")[0] == "vfmlab":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in MODULES else node.module)
    return found


def top(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def floor(module: str) -> int:
    """That of the longest name in FLOORS which leads to `module`."""
    parts = module.split(".")[1:]
    return next(FLOOR[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in FLOOR)


def test_floors_are_told_for_every_module():
    unknown = sorted({top(name) for name in MODULES if top(name)} - set(FLOOR))
    assert not unknown, f"say on which floor these stand (FLOORS in {Path(__file__).name}): {unknown}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downwards(name: str):
    here = top(name)
    if here is None:
        pytest.skip("the package itself only forwards names, lazily")
    for other in imports(MODULES[name]):
        if other == "vfmlab":
            continue  # the package's own facts, such as __version__
        assert other in MODULES, f"{name} imports {other}, which does not exist"
        assert floor(other) <= floor(name), f"{name} imports {other} from a floor above its own"


def check_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports run in a circle: " + " -> ".join(reversed(error.args[1])))


def test_no_circle_of_modules():
    """At the heads of modules, where a circle would depend on which module is imported first."""
    graph = {name: imports(path, lazy=False) - {name} for name, path in MODULES.items()}
    for name in graph:  # importing a.b runs a/__init__.py first; that of config only forwards names
        parent = name.rpartition(".")[0]
        assert not parent or parent in graph, f"{parent} has no __init__.py"
        if parent not in ("", "vfmlab", "vfmlab.config") and name not in graph[parent]:
            graph[name].add(parent)
    check_no_circle(graph)


def test_no_circle_of_lazy_imports():
    """Not even imports inside functions run in a circle."""
    check_no_circle({name: imports(path) - {name, "vfmlab"} for name, path in MODULES.items()})


def test_chains_of_imports_are_short():
    """At the heads of modules, from what a notebook imports down to the errors."""
    graph = {name: imports(path, lazy=False) & (MODULES.keys() - {name, "vfmlab"}) for name, path in MODULES.items()}
    length: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        length[name] = 1 + max((length[other] for other in graph[name]), default=0)
    assert length["vfmlab.widgets"] <= 16
    assert length["vfmlab.plots.figures"] <= 10


def test_the_root_holds_few_modules():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES
    assert all((path / "__init__.py").exists() for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py")))


def test_few_floors():
    assert len(FLOORS) <= MOST_FLOORS


def test_lines_fit_the_page():
    """Tables may be wider: rows between brackets that a formatter leaves alone, and those of docstrings."""
    wide = []
    for path in [*FILES, *(ROOT / "apps").glob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        table = {n for node in ast.walk(ast.parse("\n".join(lines)))
                 if hasattr(node, "end_lineno") and not isinstance(node, ast.ClassDef | ast.FunctionDef)
                 and "# fmt: skip" in lines[node.end_lineno - 1] for n in range(node.lineno, node.end_lineno + 1)}  # fmt: skip
        wide += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1)
                 if len(line) > WIDEST and n not in table and not line.lstrip().startswith("|")]
    assert not wide, f"{len(wide)} lines are wider than {WIDEST} columns: {wide[:12]}"


def test_plots_only_draw():
    """A figure takes results: what trains, samples or measures stands in other rooms."""
    for name in MODULES:
        if top(name) == "plots":
            above = {other for other in imports(MODULES[name]) if top(other) in ("api", "training", "diffusion", "studies", "cli")}
            assert not above, f"{name} imports {sorted(above)}"


def test_one_executor():
    """Nothing else starts a process."""
    for name, path in MODULES.items():
        if name in STARTS_PROCESSES | ASKS_OTHERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert not {"subprocess", "multiprocessing", "distributed", "dask"} & {n.split(".")[0] for n in names}, f"{name}:{node.lineno}"


def test_one_page_writer():
    """HTML pages come from the one template."""
    for name, path in MODULES.items():
        assert not re.search(r"<!doctype|<html|<body", path.read_text(), re.IGNORECASE), f"{name} writes a page of its own"


def test_phases_are_not_told_apart_by_strings():
    """A phase knows its kind by its class; only a kind that somebody asks for is compared."""
    places = [f"{name}:{n}" for name, path in MODULES.items() for n, line in enumerate(path.read_text().splitlines(), 1)
              if re.search(r"(run|folder|phase|recipe|run_dir)\.kind (==|!=) [\"']", line)]  # fmt: skip
    assert not places, places


def test_plain_words():
    """Names are field terms, one word for one idea."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            used = [getattr(node, field, None) for field in ("id", "arg", "attr", "name")]
            used = [word for word in used if isinstance(word, str) and not word.endswith("NotFoundError")]
            words = {part for word in used for part in re.split(r"[_\d]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", word).lower())}
            assert not words & PRIVATE_WORDS, f"{name}:{getattr(node, 'lineno', '?')}: {sorted(words & PRIVATE_WORDS)}"


def test_no_file_grows_too_long():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > LONGEST}
    assert not long, f"split these along their ideas (limit {LONGEST} lines): {long}"


def test_one_base_class_deep():
    """A class that brings methods builds on at most one other class of the project that does."""
    bases: dict[str, list[str]] = {}
    methods: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
                if any(isinstance(child, ast.FunctionDef) for child in node.body):
                    methods.add(node.name)
    # Config sections are data, not behaviour: theirs may be deeper.
    data = {"Section", "Config"}

    def depth(name: str, seen: frozenset = frozenset()) -> int:
        if name not in bases or name in seen or name in data or name.endswith("Config"):
            return 0
        return (name in methods) + max((depth(base, seen | {name}) for base in bases[name]), default=0)

    deep = {name: depth(name) for name in bases if depth(name) > 2}
    assert not deep, f"deeper than one base class: {deep}"


def test_library_does_not_print():
    for name, path in MODULES.items():
        if top(name) in MAY_PRINT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                assert any(key.arg == "file" for key in node.keywords), f"{name}:{node.lineno} prints"


def test_every_module_imports():
    """From the top floor down, the opposite of the usual order; without circles any order then works."""
    names = [name for name in MODULES if top(name) and not name.endswith("__main__")]
    names.sort(key=lambda name: -floor(name))
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: cannot tell which files belong to the project")
    suffixes = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".ipynb", ".html", ".css", ""}
    return [ROOT / name for name in listed.stdout.split("\0") if name and Path(name).suffix in suffixes]


def test_nothing_is_bound_to_a_machine():
    """No absolute path of somebody's machine, no package index: versions only, folders by argument or beside."""
    paths = "|".join(f"/{name}/" for name in ("root", "work", "home", "Users"))
    flags = "|".join("-".join(words) for words in (("index", "url"), ("find", "links")))  # in parts: this file is read too
    index = rf"{flags}|https?://[^\s\"')]*/(simple|whl|packages)\b"
    hits = []
    for path in tracked():
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            hits += [f"{path.relative_to(ROOT)}: {found.group()}" for found in re.finditer(f"{paths}|{index}", text)]
    assert not hits, hits
