"""Imports: clinllm against the nearest peers, on the same files, in turn, each in processes of its own.

python tests/bench/bench_import.py [--patients 1000,10000] [--ours-only 100000] [--rounds 2] [--cap 600] [--peers all|none|name,name] [--demos yes|no] [--name import]

Prints a table per export and leaves data/cache/bench/import.json and import.png. Peers cannot live beside polars 2, so each gets an environment below
data/cache/bench-peers, made with venv and pip on the first run (PyHealth brings torch: several GB); one that does not install is left out with the reason.
The exports are the synthetic hospital in the shape of MIMIC-IV (mimic_export.py) and, where they are at hand (CLINLLM_DATA or ../shared/data), the open demos.

What is timed: `seconds` is the whole command from the start of the process to its end; `work` leaves out the import of Python packages; `CPU` is the processor time of the work in all
processes, which tells most on a busy machine. MEDS-Extract starts a process for each of its stages, so start-up is part of its work. Memory is the largest sum over the process tree of
the memory that belongs to it (PSS; RSS where a system has no PSS), looked at every 0.1 s.
All read the same tables and all of their rows. What they make of them differs, so compare seconds for the same rows first, events per second second:
  clinllm      MEDS dataset, sorted by patient and time; every value checked, units normalised, duplicates found, rejects with file and line, code table, splits
  PyHealth     its event table (set up by global_event_df): strings as they come, one row per row of a table, sorted by patient; dev mode off
  meds_etl     MEDS 0.3 dataset, sorted; tables that the export lacks are given to it with a header only
  MEDS-Extract the MIMIC-IV-MEDS 0.2 specification cut to the tables that the export has, plus a block for prescriptions after its block for pharmacy (which the others do not read)
"""
import argparse, gzip, json, os, platform, shutil, signal, statistics, subprocess, sys, tempfile, threading, time
from datetime import datetime
from pathlib import Path
from typing import Callable, NamedTuple
import psutil, pyarrow.parquet as pq
from mimic_export import FILES, write_export

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "data" / "cache"; HOME, ENVS = CACHE / "bench", CACHE / "bench-peers"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DATA = Path(os.environ.get("CLINLLM_DATA") or ROOT.parent / "shared" / "data")

# ---- what each contender runs; arguments are the export and an empty folder to write to

TIMED = """
import resource, subprocess, sys, time
def used(): return sum(getattr(resource.getrusage(who), k) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) for k in ("ru_utime", "ru_stime"))
def main():
    export, out = sys.argv[1:3]
    {imports}
    start, before = time.perf_counter(), used()
    {work}
    print("WORK", time.perf_counter() - start, used() - before, flush=True)
if __name__ == "__main__": main()
"""
OURS = ("from clinllm.ehr.importing import run_import; from clinllm.ehr.{module} import {constant} as format", 'run_import(format, export, out + "/meds", progress=False, kind="synthetic")')
PYHEALTH = ("from pyhealth.datasets import {dataset} as Dataset", "Dataset(root=export, tables={tables!r}, cache_dir=out, num_workers={workers}).global_event_df")
MEDS_ETL = ("from meds_etl.mimic import main as work", 'sys.argv = ["meds_etl_mimic", export, out + "/meds", "--num_shards", "{shards}", "--num_proc", "{workers}", "--backend", "{backend}"]; work()')
MEDS_EXTRACT = ("import yaml; from importlib.resources import files", """
    keep = {tables!r}
    spec = yaml.safe_load((files("MIMIC_IV_MEDS") / "event_configs.yaml").read_text())
    spec = {{k: v for k, v in spec.items() if k in keep or k == "etl"}}; spec["etl"]["raw_dataset_version"] = "2.2"
    event = lambda word, column: dict(code='f"MEDICATION//%s//{{$drug ?? \\'UNK\\'}}"' % word, time='$%s::"%%Y-%%m-%%d %%H:%%M:%%S"' % column, hadm_id="$hadm_id")
    spec["hosp/prescriptions"] = dict(medication_start=event("START", "starttime"), medication_stop=event("STOP", "stoptime"))
    bare = lambda v: {{k: bare(x) for k, x in v.items() if k != "_metadata"}} if isinstance(v, dict) else v     # names of codes need files that the export lacks
    open(out + "/spec.yaml", "w").write(yaml.safe_dump(bare(spec), sort_keys=False))
    subprocess.run(["meds-extract-run", "spec=" + out + "/spec.yaml", "output_dir=" + out + "/meds", "do_download=false", "input_dir=" + export], check=True)""")
EMPTY = {   # tables that meds_etl opens although an export may lack them: the columns that it reads
    "icu/datetimeevents": "caregiver_id,storetime,itemid,value", "icu/inputevents": "caregiver_id,starttime,endtime,storetime,itemid,rate,rateuom,ordercategorydescription", "icu/chartevents": "caregiver_id,charttime,storetime,itemid,value,valueuom",
    "icu/procedureevents": "caregiver_id,starttime,endtime,storetime,itemid,value,valueuom,location,locationcategory", "icu/ingredientevents": "caregiver_id,starttime,endtime,storetime,itemid,rate,rateuom",
    "icu/outputevents": "caregiver_id,storetime,itemid,value,valueuom", "hosp/drgcodes": "drg_type,drg_code", "hosp/hcpcsevents": "chartdate,hcpcs_cd,seq_num", "hosp/omr": "chartdate,result_name,result_value", "hosp/procedures_icd": "seq_num,chartdate,icd_code,icd_version",
    "hosp/microbiologyevents": "order_provider_id,chartdate,charttime,spec_type_desc,storedate,storetime,test_name,org_name,ab_name,dilution_text,interpretation,comments", "hosp/services": "transfertime,curr_service", "hosp/transfers": "careunit,intime",
    "hosp/labevents": "itemid,storetime,charttime,value,order_provider_id,valueuom,priority,comments"}


def meds_etl_source(export: Path) -> Path:
    "The export as meds_etl wants it: below 2.2/, gzipped, and every table there; made before the clock starts"
    source = Path(str(export) + "-meds-etl")
    if source.is_dir(): return source
    work = Path(tempfile.mkdtemp(dir=HOME))
    for table in {*FILES, *EMPTY}:
        to = work / "2.2" / f"{table}.csv.gz"; to.parent.mkdir(parents=True, exist_ok=True); plain = export / f"{table}.csv"
        if (export / f"{table}.csv.gz").is_file(): os.symlink(export / f"{table}.csv.gz", to)
        elif plain.is_file(): to.write_bytes(gzip.compress(plain.read_bytes(), 4))
        elif table in EMPTY: to.write_bytes(gzip.compress(("subject_id,hadm_id," + EMPTY[table] + "\n").encode()))
    os.replace(work, source); return source


class Contender(NamedTuple):
    "Something that imports"
    name: str
    env: str | None         # its environment below ENVS; None: this one
    needs: list             # for pip
    python: tuple           # versions of Python that it runs on
    formats: dict           # format: function of (python, export, empty folder) that makes the command
    source: Callable = lambda export: export    # the export as it wants it

def script(parts, **values):
    "A command that runs a timed script; a file, because some start processes"
    text = TIMED.format(imports=parts[0].format(**values), work=parts[1].format(**values))
    def command(python, export, out): (Path(out) / "run.py").write_text(text); return [python, str(Path(out) / "run.py"), str(export), str(out)]
    return command

MIMIC_TABLES, EICU_TABLES = ["diagnoses_icd", "prescriptions", "labevents"], ["diagnosis", "medication", "treatment", "admissiondx"]
OF = dict(mimic=("mimic_iv", "MIMIC_IV"), eicu=("eicu", "EICU"), clif=("clif", "CLIF"))



def pyhealth(workers):
    made = lambda dataset, tables: script(PYHEALTH, dataset=dataset, tables=tables, workers=workers)
    return Contender(f"PyHealth, {workers} worker{'s' * (workers > 1)}", "pyhealth", ["pyhealth==2.1.0"], ((3, 12), (3, 13)), {"mimic": made("MIMIC4EHRDataset", MIMIC_TABLES), "mimic-demo": made("MIMIC4EHRDataset", MIMIC_TABLES[:2]), "eicu-shared": made("eICUDataset", EICU_TABLES)})

def meds_etl(backend, workers):
    run = script(MEDS_ETL, shards=2 * CORES, workers=workers, backend=backend)
    return Contender(f"meds_etl, {backend}, {workers} process{'es' * (workers > 1)}", "meds-etl", ["meds_etl==0.3.11", "meds_etl_cpp==0.4.0", "polars<2"], ((3, 10), (3, 11), (3, 12)), {"mimic": run, "mimic-demo": run}, meds_etl_source)

def meds_extract():
    made = lambda tables: script(MEDS_EXTRACT, tables=[t for t in tables if t != "hosp/d_labitems"])
    return Contender("MEDS-Extract", "meds-extract", ["MIMIC-IV-MEDS==0.2.0"], ((3, 11), (3, 12), (3, 13)), {"mimic": made(FILES), "mimic-demo": made([f for f in FILES if f != "hosp/labevents"])})

def contenders():
    ours = Contender("clinllm", None, [], (), {f: script(OURS, module=OF[f.split("-")[0]][0], constant=OF[f.split("-")[0]][1]) for f in ("mimic", "mimic-demo", "eicu", "eicu-shared", "clif")})
    return [ours, meds_etl("polars", 1), meds_etl("cpp", CORES), meds_extract(), pyhealth(1), *([pyhealth(CORES)] if CORES > 1 else [])]

# ---- environments

def find_python(versions) -> str | None:
    "A Python of one of these versions on this machine"
    names = [sys.executable, *(f"python{a}.{b}" for a, b in versions), *map(str, sorted(Path.home().glob(".pyenv/versions/*/bin/python")))]
    for name in names:
        try: said = subprocess.run([name, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, timeout=30)
        except OSError: continue
        if said.returncode == 0 and tuple(map(int, said.stdout.split())) in versions: return name
    return None


def environment(c: Contender):
    "The Python to run a contender with, or why there is none"
    if c.env is None: return sys.executable, None
    home = ENVS / c.env; python = home / "bin" / "python"; wish = home / "installed.txt"
    if wish.is_file() and wish.read_text().split() == c.needs: return str(python), None
    base = find_python(c.python)
    if base is None: return None, f"needs Python {' or '.join(f'{a}.{b}' for a, b in c.python)}, which is not on this machine"
    print(f"{c.env}: installing {', '.join(c.needs)} (once)", flush=True)
    for command in ([base, "-m", "venv", "--clear", str(home)], [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *c.needs]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: return None, "did not install: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    wish.write_text("\n".join(c.needs)); return str(python), None

# ---- measuring

def tree_memory(root: psutil.Process) -> int:
    "Bytes that belong to a process and all below it"
    total = 0
    for p in [root, *root.children(recursive=True)]:
        try: total += getattr(p.memory_full_info(), "pss", 0) or p.memory_info().rss
        except psutil.Error: pass
    return total


def measure(command, cap) -> dict:
    "Seconds and peak memory of a command; status ok, failed or stopped at the cap"
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter(); child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=HOME, env={**os.environ, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"}); root, peak, status = psutil.Process(child.pid), 0, None
        while child.poll() is None:
            try: peak = max(peak, tree_memory(root))
            except psutil.Error: pass
            if time.perf_counter() - start > cap: status = "stopped"; os.killpg(child.pid, signal.SIGKILL); child.wait(); break
            try: child.wait(0.1)
            except subprocess.TimeoutExpired: pass
        seconds = time.perf_counter() - start
        log.seek(0); said = log.read().decode(errors="replace").strip().splitlines()
    status = status or ("ok" if child.returncode == 0 else "failed")
    work, cpu = next((map(float, l.split()[1:]) for l in said[::-1] if l.startswith("WORK ")), (seconds, None))
    return dict(seconds=seconds, work=work, cpu=cpu, peak_mb=peak / 2**20, status=status, said="" if status == "ok" else (said or ["no message"])[-1][:300])


def events_in(folder: Path) -> int:
    "Rows of the tables that an import left"
    kept = [p for p in folder.rglob("*.parquet") if "data" in p.relative_to(folder).parts[:-1] and "meds" in p.relative_to(folder).parts[:1]] or list(folder.glob("*/global_event_df.parquet/*.parquet"))
    return sum(pq.read_metadata(p).num_rows for p in kept)


def run(c: Contender, python: str, format: str, export: Path, cap: float) -> dict:
    "One import from nothing"
    with tempfile.TemporaryDirectory(dir=HOME) as out:
        got = measure(c.formats[format](python, c.source(export), out), cap)
        events = events_in(Path(out)) if got["status"] == "ok" else None
        return {**got, "events": events} if events != 0 else {**got, "events": None, "status": "failed", "said": "ended well and wrote nothing"}

# ---- what is imported

def synthetic(patients: int) -> tuple:
    "The synthetic export of some size; made once"
    folder = HOME / f"export-{patients}"
    if not (folder / "export.json").is_file(): print(f"making an export of {patients:,} patients", flush=True); write_export(folder, patients)
    about = json.loads((folder / "export.json").read_text()); return folder, sum(about["rows"].values())


def linked(name: str, files: dict) -> Path:
    "A folder of links, so that all read the same tables and no others"
    folder = HOME / name; shutil.rmtree(folder, ignore_errors=True)
    for to, path in files.items(): (folder / to).parent.mkdir(parents=True, exist_ok=True); os.symlink(path, folder / to)
    return folder


def demos() -> list:
    "The open demos at hand: name, format, folder"
    found = []
    if (DATA / "eicu-demo").is_dir():
        found.append(("eICU demo, shared tables", "eicu-shared", linked("eicu-shared", {f"{t}.csv.gz".replace("dx", "Dx"): DATA / "eicu-demo" / f"{t}.csv.gz" for t in ("patient", *EICU_TABLES)})))
        found.append(("eICU demo, all tables", "eicu", DATA / "eicu-demo"))
    tiny = DATA / "mimic4-demo-tinyehr"
    if tiny.is_dir():
        have = {t: next((p for p in (tiny / f"{Path(t).name}.csv", tiny / f"{Path(t).name}.csv.gz") if p.is_file()), None) for t in FILES if t not in ("hosp/labevents", "hosp/d_labitems")}
        found.append(("MIMIC-IV demo, shared tables", "mimic-demo", linked("mimic-shared", {t + "".join(p.suffixes): p for t, p in have.items() if p})))
        found.append(("MIMIC-IV demo, all tables", "mimic", tiny))
    if (DATA / "mimic4-demo-clif").is_dir() and (ROOT / "clinllm" / "ehr" / "clif.py").is_file(): found.append(("MIMIC-IV demo as CLIF", "clif", DATA / "mimic4-demo-clif"))
    return found

# ---- the table

def compare(name, format, export, rows, who, rounds, cap) -> list:
    "All contenders in turn, `rounds` times; the best of each counts"
    who = [w for w in who if format in w[0].formats]; tries = {c.name: [] for c, _ in who}
    for r in range(rounds):
        for c, python in (who if r % 2 == 0 else who[::-1]):
            if any(t["status"] != "ok" for t in tries[c.name]): continue
            tries[c.name].append(run(c, python, format, export, cap)); t = tries[c.name][-1]
            print(f"  {c.name}: {t['seconds']:.1f} s, {t['peak_mb']:,.0f} MB, {t['status']} {t['said']}", flush=True)
    out = []
    for c, _ in who:
        ok = [t for t in tries[c.name] if t["status"] == "ok"]; best = min(ok or tries[c.name], key=lambda t: t["seconds"])
        least = lambda key: min((t[key] for t in ok), default=None)
        out.append(dict(export=name, contender=c.name, rows=rows, status=best["status"], said=best["said"], seconds=best["seconds"], work=least("work"), cpu=least("cpu"), all_seconds=[t["seconds"] for t in tries[c.name]], peak_mb=max(t["peak_mb"] for t in tries[c.name]), events=best["events"]))
    return out


def show(name, results):
    "Print one export's results"
    ours = next(r for r in results if r["contender"] == "clinllm"); rows = f" ({ours['rows']:,} rows)" if ours["rows"] else ""
    print(f"\n{name}{rows}\n{'':26}{'seconds':>9}{'work':>8}{'CPU':>8}{'peak MB':>9}{'events':>12}{'events/s':>11}   clinllm is so many times as fast (whole / work / CPU)")
    for r in results:
        if r["status"] != "ok": print(f"{r['contender']:26}{r['seconds']:9.1f}   {r['status']}: {r['said']}"); continue
        ratio = "" if r is ours else " / ".join(f"{r[k] / ours[k]:.1f}" for k in ("seconds", "work", "cpu"))
        print(f"{r['contender']:26}{r['seconds']:9.1f}{r['work']:8.1f}{r['cpu']:8.1f}{r['peak_mb']:9,.0f}{r['events']:12,}{r['events'] / r['work']:11,.0f}   {ratio}")


def draw(results, sizes, path):
    "Seconds and memory against the number of patients"
    import matplotlib; matplotlib.use("Agg")
    import matplotlib.pyplot as plt, seaborn as sns
    sns.set_theme(style="whitegrid", palette="colorblind"); fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for k, who in enumerate(dict.fromkeys(r["contender"] for r in results)):
        points = sorted((sizes[r["export"]], r) for r in results if r["contender"] == who and r["export"] in sizes and r["status"] == "ok") if any(r["export"] in sizes for r in results) else []
        x = [n for n, _ in points]
        for ax, value in zip(axes, ("work", "peak_mb")): ax.plot(x, [r[value] for _, r in points], "o-", label=who, lw=3 if who == "clinllm" else 1.5, zorder=9 - k)
    for ax, title, y in zip(axes, ("Time against the number of patients", "Memory against the number of patients"), ("seconds, start-up left out (best run)", "peak memory, MB (largest run)")):
        ax.set(xscale="log", yscale="log", xlabel="patients", ylabel=y, title=title)
    axes[1].legend(fontsize=8); sns.despine(); fig.tight_layout(); fig.savefig(path, dpi=120); plt.close(fig)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--patients", default="1000,10000", help="sizes for all contenders"); p.add_argument("--ours-only", default="100000", help="sizes for clinllm alone; empty for none")
    p.add_argument("--rounds", type=int, default=2); p.add_argument("--cap", type=float, default=600, help="seconds after which a run is stopped"); p.add_argument("--peers", default="all", help="all, none, or parts of names")
    p.add_argument("--demos", default="yes", help="yes or no: also the open demos"); p.add_argument("--name", default="import", help="name of the JSON and PNG"); a = p.parse_args(); HOME.mkdir(parents=True, exist_ok=True)
    who, left = [], {}
    for c in contenders():
        if c.env and a.peers != "all" and not any(w and w in c.name for w in a.peers.split(",")): continue
        python, why = environment(c)
        if python is None: left[c.name] = why; print(f"{c.name} is left out: {why}", flush=True); continue
        who.append((c, python))
    numbers = lambda text: [int(n) for n in text.split(",") if n.strip()]; results, sizes = [], {}
    jobs = [(f"{n:,} synthetic patients", "mimic", *synthetic(n), who if n in numbers(a.patients) else who[:1], n) for n in sorted({*numbers(a.patients), *numbers(a.ours_only)})]
    jobs += [(name, f, folder, None, who if "shared" in name else who[:1], None) for name, f, folder in (demos() if a.demos == "yes" else [])]
    for name, f, folder, rows, some, n in jobs:
        if n: sizes[name] = n
        print(f"\n{name}", flush=True); got = compare(name, f, folder, rows, some, a.rounds, a.cap); results += got; show(name, got)
    about = dict(when=datetime.now().isoformat(timespec="seconds"), cores=CORES, machine=platform.processor() or platform.machine(), python=platform.python_version(), rounds=a.rounds, cap=a.cap, load=os.getloadavg()[0], left_out=left, results=results)
    (HOME / f"{a.name}.json").write_text(json.dumps(about, indent=1))
    if sizes: draw(results, sizes, HOME / f"{a.name}.png"); print(f"\nsaved: {(HOME / a.name).relative_to(ROOT)}.json and .png")


if __name__ == "__main__": main()
