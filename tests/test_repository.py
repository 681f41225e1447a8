"The house rules: arrows between rooms, library in step with notebooks, settings explained, notebooks in shape."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from clinllm.core.settings import SCHEMA

ALLOWED = {"core": set(), "ehr": {"core"}, "privacy": {"core"}, "models": {"core"}, "evaluation": {"core"}, "governance": {"core"},
           "tuning": {"core", "models"}, "prompting": {"core", "models"}, "fusion": {"core", "ehr", "models"}}

def imported_rooms(path):
    "Rooms of clinllm that a module imports, anywhere in it"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 2: yield (node.module or node.names[0].name).split(".")[0]      # from ..room.module
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (n.split(".")[1] for n in names if n.startswith("clinllm."))

def test_arrows_go_one_way(root):
    wrong = [(p.parent.name, r) for p in (root / "clinllm").glob("*/*.py") for r in imported_rooms(p)
             if p.parent.name in ALLOWED and r != p.parent.name and r not in ALLOWED[p.parent.name]]
    assert not wrong

def test_every_setting_is_known_and_explained(root):
    lines, section, seen = (root / "settings.ini").read_text().splitlines(), None, set()
    for before, line in zip(["", *lines], lines):
        if line.startswith("["): section = line.strip("[]")
        elif "=" in line and not line.startswith("#"):
            seen.add((section, line.split("=")[0].strip()))
            assert before.startswith("#") or ("gates" in section and "max_calibration" in line), f"[{section}] {line!r} has no comment above it"
    assert seen == {(s, k) for s in SCHEMA for k in SCHEMA[s]}

def notebooks(root): return [p for p in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]

def test_library_is_in_step_with_its_notebooks(root, tmp_path):
    "Exporting the notebooks again gives the committed modules"
    copy = tmp_path / "copy"; copy.mkdir()
    for name in ("nbs", "clinllm"): shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(root / name, copy / name)
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=copy, check=True, capture_output=True)
    for p in (root / "clinllm").rglob("*.py"):
        assert (copy / p.relative_to(root)).read_text() == p.read_text(), f"{p.name} is out of step with its notebook; run nbdev-export"

def test_notebooks_are_short_and_experiments_have_parameters(root):
    for p in notebooks(root):
        nb = json.loads(p.read_text()); code = [c for c in nb["cells"] if c["cell_type"] == "code"]
        assert len(code) <= 45, f"{p.name} has {len(code)} code cells"
        assert max((sum(bool(l.strip()) for l in c["source"]) for c in code), default=0) <= 60, p.name
        if p.parent.name == "experiments":
            assert any("parameters" in c["metadata"].get("tags", []) for c in code), p.name
            assert not any(c["outputs"] for c in code), f"{p.name}: experiments are committed unrun"

def test_nothing_names_the_machine_it_was_made_on(root):
    private = re.compile("|".join("/" + folder for folder in (r"home/\w+", "root/", r"work/\w+", r"Users/\w+")))
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split("\n")
    if not any(tracked): pytest.skip("not a git checkout")
    for name in filter(None, tracked):
        if (p := root / name).suffix in {".ipynb", ".py", ".md", ".ini", ".toml", ".yml", ".yaml", ".cfg", ""} and p.is_file():
            found = private.search(p.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{name} names {found.group()}"

def test_no_module_imports_itself_by_a_detour(root):
    files = {".".join(p.relative_to(root).with_suffix("").parts): p for p in (root / "clinllm").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py")}
    arrows = {}
    for name, path in files.items():
        found, room = set(), name.split(".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*(room[:-node.level] if node.level else []), *([node.module] if node.module else [])])
                found |= {base, *(f"{base}.{a.name}" for a in node.names)}
        arrows[name] = {f for f in found if f in files and f != name}
    assert sum(map(len, arrows.values())) > 50      # the test sees arrows at all
    while ends := [n for n, to in arrows.items() if not to & set(arrows)]:
        for n in ends: del arrows[n]
    assert not arrows, f"these import each other in a circle: {sorted(arrows)}"
