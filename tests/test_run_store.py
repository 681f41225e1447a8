"The runner and its store, on tiny notebooks in a project of their own. Runs land whole, are not repeated, and survive being killed."
import os, re, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import nbformat, psutil, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from clinllm.core.settings import load_settings
from clinllm.core.tables import Evidence
from clinllm.run.runner import make_plan, run_experiments
from clinllm.run.store import list_runs, read_manifest

COMMAND = [sys.executable, "-c", "import sys; from clinllm.run.cli import main; sys.exit(main())"]
PARAMETERS = "seed: int = 42  # seed of every random choice\nsize: int = 3  # patients, count; in [1, 10]"
FINISH = 'run.finish(None, claim("data", "patients", "all", float(size), n=size))'

class Project:
    "A project in a temporary folder"
    def __init__(self, root: Path):
        self.root, self.reports = root, root / "reports"
        (root / "nbs/experiments").mkdir(parents=True); (root / "model").mkdir(); (root / "model" / "weights").write_text("none"); self.settings_text("")
    def settings_text(self, text, sources="synthetic"): (self.root / "settings.ini").write_text(f"[data]\nsources = {sources}\n[model]\nname = model\n{text}")
    @property
    def settings(self): return load_settings(self.root / "settings.ini")
    def experiment(self, name, body=FINISH, header="", parameters=PARAMETERS):
        nb = new_notebook(cells=[new_markdown_cell(f"# {name}\n\n{header}"), new_code_cell(parameters, metadata=dict(tags=["parameters"])),
                                 new_code_cell(f"import os, time\nfrom pathlib import Path\nfrom clinllm.run.experiment import start_run\nfrom clinllm.core.tables import claim\nrun = start_run({name!r}, globals())"),
                                 new_markdown_cell("## Work"), new_code_cell(body)], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")))
        for i, c in enumerate(nb.cells): c["id"] = f"cell-{i}"
        nbformat.write(nb, path := self.root / "nbs/experiments" / f"{name}.ipynb"); return path
    @property
    def env(self): return {**os.environ, "CLINLLM_ROOT": str(self.root), "CLINLLM_REPORTS": "reports"}
    def clinllm(self, *args): return subprocess.run([*COMMAND, *map(str, args)], env=self.env, capture_output=True, text=True, timeout=120)
    def start(self, *args): return subprocess.Popen([*COMMAND, *map(str, args)], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    def run(self, *names, **k): return {j.experiment.name: j for j in run_experiments(names, settings=self.settings, **k)}
    def temps(self): return list(self.reports.glob(".tmp-*"))

@pytest.fixture
def project(tmp_path): return Project(tmp_path)

def wait_for(condition, seconds=40):
    "Wait until `condition()` holds"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")

def gone(pids): return all(not psutil.pid_exists(p) or psutil.Process(p).status() == psutil.STATUS_ZOMBIE for p in pids)

NUMBER = re.compile(r"\d+(\.\d+)?")
SLOW = """flag = Path(os.environ["CLINLLM_ROOT"], "fast")
if not flag.exists():
    Path(os.environ["CLINLLM_ROOT"], "pids").write_text(f"{os.getpid()} {os.getppid()}"); time.sleep(60)
""" + FINISH

# ---- what is refused before a kernel starts

@pytest.mark.parametrize("args, said", [
    (["run", "trial", "-p", "lerning_rate=1e-3"], "learning_rate"), (["run", "trial", "-p", "epochs=-1"], "[1, 100]"), (["run", "trial", "-p", "epochs=two"], "type int"),
    (["run", "trial", "-p", "data=nowhere"], "nowhere"), (["run", "trail"], "Did you mean 'trial'"), (["run", "trial", "--grid", "epochs=1,0"], "[1, 100]"),
    (["run", "trial", "--jobs", "0"], "at least 1"), (["run", "torn"], "not a readable notebook"), (["run", "untagged"], "tag `parameters`")])
def test_refused_with_the_rule_and_the_nearest_name(project, args, said):
    project.experiment("trial", parameters='data: str = "synthetic"  # source\nlearning_rate: float = 5e-4  # step; in (0, 0.1]\nepochs: int = 1  # passes; in [1, 100]')
    if "torn" in args: (project.root / "nbs/experiments/torn.ipynb").write_text('{"cells": [')
    if "untagged" in args: nbformat.write(new_notebook(cells=[new_markdown_cell("# U"), new_code_cell("epochs: int = 1")]), project.root / "nbs/experiments/untagged.ipynb")
    done = project.clinllm(*args)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not project.reports.exists() or not list(project.reports.iterdir())

def test_wrong_settings_are_refused(project):
    project.experiment("trial")
    for text, said in [("[experiment.trial]\nsizee = 3", "Did you mean 'size'"), ("[experiment.trail]\nsize = 3", "Did you mean 'trial'"), ("[experiment.trial]\nsize = 99", "[1, 10]")]:
        project.settings_text(text); done = project.clinllm("run")
        assert done.returncode == 2 and said in done.stderr and "settings.ini" in done.stderr

# ---- which value counts, and what lands

def test_precedence_and_a_whole_run(project):
    project.experiment("trial", parameters=PARAMETERS + "\nlabel: str = \"a\"  # text\nn_patients: int = 2000  # patients, count")
    project.settings_text("[experiment.trial]\nsize = 5\nlabel = b\n[study]\nseed = 7")
    done = project.clinllm("run", "trial", "-p", "size=6")
    assert done.returncode == 0, done.stdout + done.stderr
    run, = list_runs(project.reports)
    assert run["params"] == dict(seed=7, size=6, label="b", n_patients=2000) and run["status"] == "ok" and run["error"] is None
    assert run["hardware"]["cores"] >= 1 and run["packages"]["polars"] and run["energy"]["wh"] > 0 and run["energy"]["basis"] and run["seconds"] > 0 and run["started"] <= run["finished"]
    evidence = Evidence.read(run["folder"] / "evidence.parquet").frame
    assert set(evidence["run_id"]) == {run["run_id"]} and evidence.set_index("metric").loc["patients", "value"] == 6 and "energy_wh" in set(evidence["metric"])
    assert {p.name for p in run["folder"].iterdir()} == {"notebook.ipynb", "evidence.parquet", "manifest.json", "figures"} and not project.temps()
    assert run["run_id"] in done.stdout and "reports/trial/" in done.stdout
    assert "size=6" in project.clinllm("status").stdout

def test_up_to_date_forced_and_changed(project):
    path = project.experiment("trial")
    first = project.run("trial")["trial"]; notebook = (first.folder / "notebook.ipynb").read_text()
    began = time.monotonic(); again = project.clinllm("run"); assert time.monotonic() - began < 10
    assert again.returncode == 0 and "Nothing to do" in again.stdout
    forced = project.run("trial", force=True)["trial"]
    assert forced.status == "ok" and forced.run_id == first.run_id and len(list_runs(project.reports)) == 1
    differing = [(a, b) for a, b in zip(notebook.splitlines(), (forced.folder / "notebook.ipynb").read_text().splitlines()) if a != b]
    assert len(differing) <= 2 and all(NUMBER.sub("#", a) == NUMBER.sub("#", b) for a, b in differing) and "papermill" not in notebook      # only what was measured differs
    nb = nbformat.read(path, 4); nb.cells[-1]["source"] += "\n# another thought"; nbformat.write(nb, path)
    changed = project.run("trial")["trial"]
    assert changed.status == "ok" and changed.run_id != first.run_id and len(list_runs(project.reports)) == 2

def test_outputs_and_notebook_times_do_not_make_a_new_run(project):
    path = project.experiment("trial"); before = make_plan(settings=project.settings)[0].code
    nb = nbformat.read(path, 4); nb.cells[1]["execution_count"] = 9; nbformat.write(nb, path)
    assert make_plan(settings=project.settings)[0].code == before

# ---- grids, sources and what comes after

def test_grid_makes_each_run_once_and_goes_on(project):
    project.experiment("trial")
    project.run("trial", params=dict(size="2"))
    jobs = run_experiments(["trial"], grid=dict(size=["1", "2"], seed=["42", "43"]), settings=project.settings, jobs=2)
    assert sorted((j.values["size"], j.values["seed"], j.status) for j in jobs) == [(1, 42, "ok"), (1, 43, "ok"), (2, 42, "up to date"), (2, 43, "ok")]
    assert len(list_runs(project.reports)) == 4 and not project.temps()

def test_sources_without_notes_are_left_out_unless_asked_for(project):
    project.experiment("trial", header="- needs: notes", parameters='data: str = "synthetic"  # source')
    project.settings_text("", sources="synthetic, mimic-iv-demo")
    jobs = make_plan(settings=project.settings)
    assert [(j.source, j.status, j.reason) for j in jobs] == [("synthetic", "waiting", ""), ("mimic-iv-demo", "skipped", "mimic-iv-demo has no notes")]
    assert [j.status for j in make_plan(params=dict(data="mimic-iv-demo"), settings=project.settings)] == ["waiting"]

READ = 'print(sorted(run.upstream()))\nrun.finish(None, claim("data", "runs", "all", float(len(run.upstream())), n=1))'

def test_what_comes_after_reads_what_landed(project):
    project.experiment("one"); project.experiment("two", 'if not Path(os.environ["CLINLLM_ROOT"], "mended").exists(): raise ValueError("on purpose")\n' + FINISH)
    project.experiment("last", READ, "- after: one, two")
    done = project.clinllm("run"); assert done.returncode == 1 and "on purpose" in done.stdout and "Traceback" not in done.stderr
    first = {r["experiment"]: r for r in list_runs(project.reports)}; failed = first["two"]
    assert {n: r["status"] for n, r in first.items()} == {"one": "ok", "two": "failed", "last": "ok"} and first["last"]["upstream"] == [first["one"]["run_id"]]
    assert failed["error"] == "ValueError: on purpose" and "on purpose" in (failed["folder"] / "notebook.ipynb").read_text()
    assert nbformat.read(failed["folder"] / "notebook.ipynb", 4).cells[0]["source"].startswith("# two")      # no banner before the title
    (project.root / "mended").touch(); second = project.run()
    assert {n: j.status for n, j in second.items()} == {"one": "up to date", "two": "ok", "last": "ok"} and second["last"].run_id != first["last"]["run_id"]
    assert read_manifest(failed["folder"])["status"] == "ok"                                                   # the failed run was replaced
    assert set(read_manifest(second["last"].folder)["upstream"]) == {second["one"].run_id, second["two"].run_id}

def test_nothing_to_read_is_skipped_with_the_next_step(project):
    project.experiment("one"); project.experiment("last", READ, "- after: one")
    job = project.run("last")["last"]
    assert job.status == "skipped" and "clinllm run one" in job.reason and not list_runs(project.reports)

def test_an_experiment_must_finish(project):
    project.experiment("trial", "1 + 1")
    assert "run.finish" in project.run("trial")["trial"].reason

def test_any_executor_will_do(project):
    project.experiment("trial")
    with ThreadPoolExecutor(1) as pool: assert project.run("trial", executor=pool)["trial"].status == "ok"

# ---- being killed

def test_kill_9_in_the_middle_then_resume(project):
    project.experiment("a_quick"); project.experiment("b_slow", SLOW)
    runner = project.start("run"); pids = wait_for(lambda: (p := project.root / "pids").exists() and p.read_text().split())
    temp, = project.temps(); assert (temp / "notebook.ipynb").exists()
    runner.kill(); runner.wait()
    wait_for(lambda: gone([int(p) for p in pids]), 15)                      # neither kernel nor worker goes on in secret
    assert [r["experiment"] for r in list_runs(project.reports)] == ["a_quick"]
    assert "b_slow" not in project.clinllm("status").stdout
    (project.root / "fast").touch()
    resumed = project.run()
    assert {n: j.status for n, j in resumed.items()} == {"a_quick": "up to date", "b_slow": "ok"} and not project.temps()

def test_ctrl_c_ends_kernels_and_leaves_nothing_half(project):
    project.experiment("slow", SLOW)
    runner = project.start("run"); pids = wait_for(lambda: (p := project.root / "pids").exists() and p.read_text().split())
    runner.send_signal(signal.SIGINT); out, _ = runner.communicate(timeout=20)
    assert runner.returncode == 130 and "goes on from there" in out and "Traceback" not in out
    assert gone([int(p) for p in pids]) and not project.temps() and not list_runs(project.reports)

def test_a_killed_worker_fails_its_run_only(project):
    project.experiment("a_killed", 'import psutil; psutil.Process(os.getppid()).kill(); time.sleep(30)'); project.experiment("b_other")
    jobs = project.run()
    assert jobs["a_killed"].status == "failed" and "killed" in jobs["a_killed"].reason and jobs["b_other"].status == "ok"
    assert [r["experiment"] for r in list_runs(project.reports)] == ["b_other"]

def test_a_dead_kernel_is_a_failed_run(project):
    project.experiment("trial", "os._exit(3)")
    job = project.run("trial")["trial"]
    assert job.status == "failed" and "Kernel" in job.reason and read_manifest(project.reports / "trial" / job.run_id)["status"] == "failed"
