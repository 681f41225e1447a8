"""The judge: clinllm against its peers on the same work, same machine, same run.

python tests/bench/bench_evaluation.py [fairness] [rouge] [report]      all three when left out

fairness   three measures x six groups x 200 patient resamples, against fairlearn's own bootstrap (MetricFrame, n_boot), at n = 2,000 and 100,000 (there ten of its resamples, scaled up)
rouge      rouge1, rouge2, rougeL and rougeLsum of the released ACI-Bench predictions, against rouge_score; the figures must agree
report     `clinllm evaluate` on 100,000 predictions, whole command
"""
import os, subprocess, sys, tempfile, time, warnings
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd
from scipy.special import expit

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CLINLLM_DATA", ROOT.parent / "shared" / "data"))


def patients(n, seed=0):
    "Predictions of one row a patient, in six groups"
    rng = np.random.default_rng(seed); x = rng.normal(-1, 1.2, n)
    return pd.DataFrame(dict(subject_id=np.arange(n), prediction_time=pd.Timestamp("2024-01-01"), label=(rng.random(n) < expit(x)).astype(int), y_prob=expit(x + rng.normal(0, 1, n)),
                             variant="score", status="ok", site=rng.choice(list("ABCDEF"), n, p=[.3, .25, .2, .1, .1, .05]), sex=rng.choice(["Female", "Male"], n)))


def timed(f):
    start = time.perf_counter(); return f(), time.perf_counter() - start


def fairness():
    from fairlearn.metrics import MetricFrame, selection_rate, true_positive_rate
    from sklearn.metrics import roc_auc_score
    from clinllm.core.tables import Predictions
    from clinllm.evaluation.fairness import fairness as ours
    at = lambda f: lambda y, p: f(y, p >= .25, pos_label=1)
    peer = {"auroc": lambda y, p: roc_auc_score(y, p) if len(set(y)) == 2 else np.nan, "true_positive_rate": at(true_positive_rate), "selection_rate": at(selection_rate)}
    for n in (2_000, 100_000):
        f = patients(n); predictions = Predictions(f); drawn = 200 if n <= 2_000 else 10     # 200 would take the peer ten minutes
        mine, t = timed(lambda: ours(predictions, ["site"], threshold=.25, n_boot=200, measures=list(peer)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame, t0 = timed(lambda: MetricFrame(metrics=peer, y_true=f["label"], y_pred=f["y_prob"], sensitive_features=f["site"], n_boot=drawn, ci_quantiles=[.025, .975], random_state=0))
        t0 *= 200 / drawn
        found = mine.frame[mine.frame["group"].str.startswith("site: ")].assign(g=lambda d: d["group"].str[-1]).set_index(["metric", "g"])
        low, high = frame.by_group_ci; off = max(abs(found.loc[(m, g), "value"] - frame.by_group.loc[g, m]) for m in peer for g in "ABCDEF")
        width = np.median([(found.loc[(m, g), "high"] - found.loc[(m, g), "low"]) / (high.loc[g, m] - low.loc[g, m]) for m in peer for g in "ABCDEF"])
        print(f"fairness, n {n:,}: clinllm {t:.2f} s, fairlearn {t0:.1f} s{f' (scaled up from {drawn} resamples)' * (drawn < 200)}; {t0 / t:.0f} times as fast. Largest difference of a value {off:.1e}{f'; interval width, ours over theirs (median) {width:.2f}' * (drawn == 200)}", flush=True)


def rouge():
    from rouge_score.rouge_scorer import RougeScorer
    from clinllm.evaluation.text import rouge as ours
    folder = DATA / "aci-bench"
    if not folder.is_dir(): print("rouge: the ACI-Bench files were not found; set CLINLLM_DATA, or run: clinllm data get aci-bench"); return
    gold = pd.read_csv(folder / "clinicalnlp_taskB_test1.csv").set_index("encounter_id")["note"]; pairs = []
    for path in sorted((folder / "predictions").glob("*.csv")):
        f = pd.read_csv(path).set_index("encounter_id")["note"].fillna(""); pairs += [(gold[i], f[i]) for i in gold.index if i in f.index]
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]; scorer = RougeScorer(names)
    ours([a for a, _ in pairs[:3]], [b for _, b in pairs[:3]])
    mine, t = timed(lambda: ours([a for a, _ in pairs], [b for _, b in pairs]))
    theirs, t0 = timed(lambda: pd.DataFrame([{m: s.fmeasure for m, s in scorer.score(a, b).items()} for a, b in pairs]))
    print(f"rouge, {len(pairs):,} notes: clinllm {t:.2f} s, rouge_score {t0:.1f} s; {t0 / t:.0f} times as fast. Largest difference of a score {(mine[names] - theirs[names]).abs().to_numpy().max():.1e}", flush=True)


def report():
    with tempfile.TemporaryDirectory() as d:
        path = Path(d, "bench-100k.csv"); patients(100_000).drop(columns=["prediction_time", "status", "variant"]).to_csv(path, index=False)
        command = [str(Path(sys.executable).with_name("clinllm")), "evaluate", str(path), "--synthetic", "--force"]
        done, t = timed(partial(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CLINLLM_REPORTS": str(Path(d, "reports"))}))
        print(f"report, 100,000 predictions of one method, two group columns, whole command: {t:.0f} s; exit code {done.returncode}. {done.stdout.splitlines()[-2] if done.returncode == 0 else done.stderr[-400:]}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["fairness", "rouge", "report"]: globals()[name]()
