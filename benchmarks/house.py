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
PAGE, START, END = Path("docs/ARCHITECTURE.md"), "<!-- house:start -->", "<!-- house:end -->"
LEADERS = ("cli", "pipeline", "run", "forms", "on_recipe")  # they lead a run; the last three were commit 594ec06's
# `figures.update()` is no call of ours, whatever class of ours has a method of that name.
FOREIGN = {name for kind in (str, list, dict, set, tuple, Path) for name in dir(kind)}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMMENT = re.compile(r"^\s*# (?!noqa|type:)|  # (?!noqa|type:)", re.MULTILINE)


class House:
    """The parsed package: its modules by dotted name; its functions, classes and constants by "module:name"."""

    def __init__(self, root: Path) -> None:
        self.sources: dict[str, str] = {}
        for path in sorted((root / PACKAGE).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            self.sources[module] = path.read_text("utf-8")
        self.trees = {module: ast.parse(source) for module, source in self.sources.items()}
        self.names: dict[str, dict[str, str]] = defaultdict(dict)  # module -> imported name -> what it stands for
        self.nodes: dict[str, list[ast.AST]] = {}  # "module:name" -> the syntax that runs when it is used
        self.methods: dict[str, list[str]] = defaultdict(list)
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                    for name in node.names:
                        whole, inside = f"{node.module}.{name.name}", f"{node.module}:{name.name}"
                        self.names[module][name.asname or name.name] = whole if whole in self.trees else inside
            for statement in tree.body:
                self._index(f"{module}:", statement)

    def _index(self, where: str, statement: ast.stmt) -> None:
        if isinstance(statement, FUNCTION):
            self.nodes[where + statement.name] = [statement]
        elif isinstance(statement, ast.ClassDef):
            methods = {part.name: part for part in statement.body if isinstance(part, FUNCTION)}
            self.nodes[where + statement.name] = [methods[name] for name in methods if name == "__init__"]
            for name, method in methods.items():
                self.nodes[f"{where}{statement.name}.{name}"] = [method]
                self.methods[name].append(f"{where}{statement.name}.{name}")
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                self.nodes[where + ast.unparse(target)] = [statement.value]

    def calls(self, node: str) -> list[str]:
        """What a function, class or constant mentions, as often as it does."""
        module, _, name = node.partition(":")
        parts = [part for syntax in self.nodes[node] for part in ast.walk(syntax)]
        local = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        local |= {part.arg for part in parts if isinstance(part, ast.arg)}
        targets: list[str] = []
        for part in parts:
            if isinstance(part, ast.Name) and part.id not in local:
                targets.append(self._resolve(module, part.id))
            elif isinstance(part, ast.Attribute):
                targets += self._attribute(module, name, part)
            elif isinstance(part, ast.List) and {"-m", "verify"} <= {getattr(e, "value", "") for e in part.elts}:
                targets.append(self.find("verify", "cli|on_recipe"))  # the command, in a process of its own
        return [target for target in targets if target in self.nodes and target != node]

    def _resolve(self, module: str, name: str) -> str:
        target = self.names[module].get(name, f"{module}:{name}")
        where, _, name = target.partition(":")  # a package may hand on what one of its modules defines
        return self.names[where].get(name, target) if target not in self.nodes else target

    def _attribute(self, module: str, name: str, part: ast.Attribute) -> list[str]:
        owner = ast.unparse(part.value)
        base = self._resolve(module, owner)
        if owner in ("self", "cls"):
            return [f"{module}:{name.rsplit('.', 1)[0]}.{part.attr}"]
        if base in self.trees:
            return [self._resolve(base, part.attr)]
        if base in self.nodes:
            return [f"{base}.{part.attr}"]
        # What a value is, is not known: a method of that name, of a package that the module imports.
        known = {room(target) for target in (module, *self.names[module].values())}
        return [m for m in self.methods[part.attr] if part.attr not in FOREIGN and room(m) in known]

    def find(self, name: str, where: str) -> str:
        """The first function of that name in a module of that name (both regular expressions)."""
        pattern = rf"{PACKAGE}[.\w]*\.({where})[.\w]*:(\w+\.)?({name})"
        return next((node for node in self.nodes if re.fullmatch(pattern, node)), "")

    def chain(self, start: str, end: str) -> list[str]:
        """The shortest chain of functions from `start` to `end`; a constant on the way is no call."""
        chains, seen = [[start]], {start}
        for chain in chains:
            if chain[-1] == end:
                return [node for node in chain if self._runs(node)]
            chains += [[*chain, target] for target in dict.fromkeys(self.calls(chain[-1])) if target not in seen]
            seen.update(chain[-1] for chain in chains)
        return []

    def _runs(self, node: str) -> bool:
        return bool(self.nodes[node]) and isinstance(self.nodes[node][0], FUNCTION)

    def changes(self, node: str, above: tuple[str, ...] = ()) -> int:
        """How often the leading packages pass the run from one to another, every call followed."""
        led = [t for t in self.calls(node) if room(t) in LEADERS and t not in above and self._runs(t)]
        return sum((room(target) != room(node)) + self.changes(target, (*above, target)) for target in led)

    def floors(self) -> dict[str, int]:
        """1 for a package or loose module that imports no other, else one more than the highest that it imports."""
        below = {room(module): set[str]() for module in self.trees}
        for module, names in self.names.items():
            below[room(module)] |= {room(target) for target in names.values()}

        def floor(name: str, above: tuple[str, ...]) -> int:
            above = (*above, name)
            return 1 + max((floor(other, above) for other in below.get(name, ()) if other not in above), default=0)

        return {name: floor(name, ()) for name in below if name}


def room(target: str) -> str:
    """The package or loose module at the top level that something is in."""
    return (target.partition(":")[0] + "..").split(".")[1]


def main() -> None:
    """Write this checkout's figures into the page, or print those of another one."""
    root = Path(*sys.argv[1:]).resolve()
    house = House(root)
    lines = {module: source.count("\n") for module, source in house.sources.items()}
    total, longest = sum(lines.values()), max(lines, key=lambda module: lines[module])
    functions = [node for tree in house.trees.values() for node in ast.walk(tree) if isinstance(node, FUNCTION)]
    spans = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    comments = sum(len(COMMENT.findall(source)) for source in house.sources.values())
    floors, run = house.floors(), house.find("run", "cli|on_recipe")
    solve = house.chain(run, house.find("solve", "regression"))
    verdict = house.chain(run, house.find("judge|check|judged", "verify|verification"))
    beside = [sum(p.read_text().count("\n") for p in (root / name).rglob("*.py")) for name in ("benchmarks", "tests")]
    table = f"""
| | before | now | goal |
|---|---|---|---|
| loose modules at the package root | 50 | {len(set(root.glob(f"{PACKAGE}/[!_]*.py")))} | at most 8 |
| files | 174 | {len(lines)} | at most 110 |
| lines | 19,420 | {total:,} | at most 15,000 |
| floors of imports (longest chain) | 22 | {max(floors.values())} | at most 13 |
| calls from `run` to the ridge solve | 6 | {len(solve) - 1} | at most 6 |
| calls from `run` to the verifier's verdict | 5 | {len(verdict) - 1} | at most 6 |
| times that `run` changes its leading package | 32 | {house.changes(run)} | at most 8 |
| lines of a function: median | 7 | {statistics.median(spans):.0f} | 7 to 12 |
| lines of a function: 90th percentile | 22 | {spans[int(0.9 * len(spans))]} | at most 45 |
| lines of a function: longest | 53 | {spans[-1]} | at most 80 |
| comments in 100 lines | 1.0 | {100 * comments / total:.1f} | at least 4 |
| lines of the longest file | 294 | {lines[longest]} ({longest.removeprefix(PACKAGE + ".")}) | at most 300 |
| lines of benchmarks | 4,090 | {beside[0]:,} | at most 2,900 |
| lines of tests | 14,376 | {beside[1]:,} | |
"""
    picture = ""
    for floor in range(max(floors.values()), 0, -1):
        names = (f"{n} ({sum(room(m) == n for m in lines)})" for n in sorted(floors) if floors[n] == floor)
        picture += f"{floor:>3}  {'  '.join(names)}\n"
    calls = [" → ".join(f"`{node.removeprefix(PACKAGE + '.')}`" for node in chain) for chain in (solve, verdict)]
    text = f"{table}\n```\n{picture}```\n\nTo the ridge solve: {calls[0]}\n\nTo the verdict: {calls[1]}\n"
    print(text)
    if not sys.argv[1:]:
        before, _, rest = PAGE.read_text("utf-8").partition(START)
        PAGE.write_text(f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
