"""Measure the structure of the package: `make house` writes the table and the picture into docs/ARCHITECTURE.md.

The source is parsed, nothing of it is imported. A function calls what it mentions, so one that is handed over in a table
(the backends) counts as called. `python -m benchmarks.house FOLDER` prints the figures of another checkout.
"""

import ast
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

PACKAGE = "compile_steer"
LEADERS = (
    "cli",
    "pipeline",
    "artifact_formats",
    "run",
    "forms",
    "on_recipe",
)  # they lead a run; the last two: 594ec06's
# `figures.update()` is no call of ours, whatever class of ours has a method of that name.
FOREIGN = {name for kind in (str, list, dict, set, tuple, Path) for name in dir(kind)}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMMENT = re.compile(r"^\s*# (?!noqa|type:)|  # (?!noqa|type:)", re.MULTILINE)
PAGE, MARKERS = Path("docs/ARCHITECTURE.md"), ("<!-- house:start -->", "<!-- house:end -->")


class House:
    """The parsed package: its modules by dotted name; its functions, classes and constants by "module:name"."""

    def __init__(self, root: Path) -> None:
        self.paths = {
            ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
            for path in sorted((root / PACKAGE).rglob("*.py"))
        }
        self.trees = {module: ast.parse(path.read_text("utf-8")) for module, path in self.paths.items()}
        self.imports: dict[str, dict[str, str]] = defaultdict(dict)  # module -> local name -> what it stands for
        self.nodes: dict[str, list[ast.stmt | ast.expr]] = {}  # "module:name" -> the syntax that runs when it is used
        self.methods: dict[str, list[str]] = defaultdict(list)
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                    for name in node.names:
                        whole = f"{node.module}.{name.name}"
                        target = whole if whole in self.trees else f"{node.module}:{name.name}"
                        self.imports[module][name.asname or name.name] = target
            for statement in tree.body:
                self._index(module, statement)

    def _index(self, module: str, statement: ast.stmt) -> None:
        if isinstance(statement, FUNCTION):
            self.nodes[f"{module}:{statement.name}"] = [statement]
        elif isinstance(statement, ast.ClassDef):
            methods = {part.name: part for part in statement.body if isinstance(part, FUNCTION)}
            self.nodes[f"{module}:{statement.name}"] = [methods[name] for name in methods if name == "__init__"]
            for name, method in methods.items():
                self.nodes[f"{module}:{statement.name}.{name}"] = [method]
                self.methods[name].append(f"{module}:{statement.name}.{name}")
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                self.nodes[f"{module}:{ast.unparse(target)}"] = [statement.value]

    def calls(self, node: str) -> list[str]:
        """What a function, class or constant mentions, in the order of the source."""
        module, _, name = node.partition(":")
        types: dict[str, str] = {}
        mentions: list[tuple[int, int, list[str]]] = []
        parts = [part for syntax in self.nodes[node] for part in ast.walk(syntax)]
        local = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        for part in parts:
            if isinstance(part, ast.arg) and isinstance(part.annotation, ast.Name):
                types[part.arg] = self._resolve(module, part.annotation.id)
            elif isinstance(part, ast.Name) and part.id not in local:
                mentions.append((part.lineno, part.col_offset, [self._resolve(module, part.id)]))
            elif isinstance(part, ast.Attribute):
                mentions.append((part.lineno, part.col_offset, self._attribute(module, name, part, types)))
            elif (
                isinstance(part, ast.Constant)
                and part.value == "verify"
                and room(module) in ("forms", "artifact_formats")
            ):
                mentions.append((part.lineno, part.col_offset, [self.find("verify", "cli|on_recipe")]))
        mentions.sort(key=lambda mention: mention[:2])
        return [target for *_, targets in mentions for target in targets if target in self.nodes and target != node]

    def _resolve(self, module: str, name: str) -> str:
        target = self.imports[module].get(name, f"{module}:{name}")
        where, _, name = target.partition(":")
        # A package may hand on what one of its modules defines.
        handed_on = target not in self.nodes and where != module and name in self.imports[where]
        return self._resolve(where, name) if handed_on else target

    def _attribute(self, module: str, name: str, part: ast.Attribute, types: dict[str, str]) -> list[str]:
        owner = ast.unparse(part.value)
        base = types.get(owner) or self._resolve(module, owner)
        if owner in ("self", "cls"):
            return [f"{module}:{name.rsplit('.', 1)[0]}.{part.attr}"]
        if base in self.trees:
            return [self._resolve(base, part.attr)]
        if base in self.nodes:
            return [f"{base}.{part.attr}"]
        return [] if part.attr in FOREIGN else self.methods[part.attr]

    def is_function(self, node: str) -> bool:
        """Whether a node is a function or a class with a constructor, not a constant."""
        return any(isinstance(syntax, FUNCTION) for syntax in self.nodes[node])

    def find(self, name: str, where: str) -> str:
        """The first function of that name in a module of that name (both regular expressions)."""
        pattern = re.compile(rf"{PACKAGE}[.\w]*\.({where})[.\w]*:(\w+\.)?({name})")
        return next((node for node in self.nodes if pattern.fullmatch(node)), "")

    def chain(self, start: str, end: str) -> list[str]:
        """The shortest chain of functions from `start` to `end`; a constant on the way is no call."""
        chains, seen = [[start]], {start}
        for chain in chains:
            if chain[-1] == end:
                return [node.removeprefix(PACKAGE + ".") for node in chain if self.is_function(node)]
            targets = [target for target in dict.fromkeys(self.calls(chain[-1])) if target not in seen]
            seen.update(targets)
            chains += [[*chain, target] for target in targets]
        return []

    def changes(self, node: str, above: tuple[str, ...] = ()) -> int:
        """How often the leading modules pass the run from one to another, every call followed in order."""
        led = [t for t in self.calls(node) if room(t) in LEADERS and self.is_function(t) and t not in above]
        return sum((room(t) != room(node)) + self.changes(t, (*above, t)) for t in led)

    def floors(self) -> dict[str, int]:
        """1 for a package or loose module that imports no other, else one more than the highest that it imports."""
        below: dict[str, set[str]] = {room(module): set() for module in self.trees if module != PACKAGE}
        for module, names in self.imports.items():
            below.setdefault(room(module), set()).update(room(target) for target in names.values())

        def floor(name: str, above: tuple[str, ...] = ()) -> int:
            return 1 + max(
                (floor(b, (*above, name)) for b in below.get(name, ()) if b not in (*above, name)), default=0
            )

        return {name: floor(name) for name in below if name}


def room(target: str) -> str:
    """The package or loose module at the top level that something is in."""
    return (target.partition(":")[0] + "..").split(".")[1]


def lines_of(folder: Path) -> int:
    """Lines of all Python files in a folder."""
    return sum(path.read_text("utf-8").count("\n") for path in folder.rglob("*.py"))


def measure(root: Path) -> tuple[list[tuple[str, str, str, str]], str]:
    """Rows of (measure, before, now, goal), and the picture: the floors, and the two chains of calls."""
    house, package = House(root), root / PACKAGE
    run = house.find("run", "cli|on_recipe")
    solve = house.chain(run, house.find("solve", "regression"))
    verdict = house.chain(run, house.find("judge|check_parity|check", "parity"))
    functions = [node for tree in house.trees.values() for node in ast.walk(tree) if isinstance(node, FUNCTION)]
    spans = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    lines = {str(path.relative_to(package)): path.read_text("utf-8").count("\n") for path in house.paths.values()}
    longest = max(lines, key=lambda name: lines[name])
    comments = sum(len(COMMENT.findall(path.read_text("utf-8"))) for path in house.paths.values())
    length = f"{statistics.median(spans):.0f} / {spans[int(0.9 * len(spans))]} / {spans[-1]}"
    loose = sum("/" not in name and not name.startswith("__") for name in lines)
    floors = house.floors()
    rows = [
        ("loose modules at the package root", "50", f"{loose}", "8"),
        ("files", "174", f"{len(lines)}", "110"),
        ("lines", "19,420", f"{sum(lines.values()):,}", "15,000"),
        ("floors of imports (longest chain)", "22", f"{max(floors.values())}", "13"),
        ("calls from `run` to the ridge solve", "6", f"{len(solve) - 1}", "6"),
        ("calls from `run` to the verifier's verdict", "5", f"{len(verdict) - 1}", "6"),
        ("times that `run` changes its leading module", "31", f"{house.changes(run)}", "8"),
        ("lines of a function: median / 90th percentile / longest", "7 / 22 / 53", length, "12 / 45 / 80"),
        ("comments in 100 lines", "1.0", f"{100 * comments / sum(lines.values()):.1f}", "(at least) 4"),
        ("longest file, lines", "294 (validate/sweep.py)", f"{lines[longest]} ({longest})", "300"),
        ("lines of benchmarks", "4,090", f"{lines_of(root / 'benchmarks'):,}", "2,900"),
        ("lines of tests", "14,376", f"{lines_of(root / 'tests'):,}", ""),
    ]
    picture = [
        f"{floor:>3}  " + "  ".join(f"{name} ({sum(room(m) == name for m in house.trees)})" for name in sorted(names))
        for floor in sorted(set(floors.values()), reverse=True)
        if (names := [name for name in floors if floors[name] == floor])
    ]
    chains = [f"{end}:\n\n" + " → ".join(f"`{n}`" for n in c) for end, c in (("Solve", solve), ("Verdict", verdict))]
    return rows, "\n\n".join(["```\n" + "\n".join(picture) + "\n```", *chains])


def main() -> None:
    """Write this checkout's figures into the page, or print those of another one."""
    rows, picture = measure(Path(*sys.argv[1:]).resolve())
    table = ["| | before | now | goal, at most |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    text = "\n".join([*table, "", picture])
    if sys.argv[1:]:
        print(text)
        return
    before, _, rest = PAGE.read_text("utf-8").partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    PAGE.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
