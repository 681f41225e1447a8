"`verify` says match where a figure agrees, differs where it does not, and not checked where it could not look"
import json
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from clinllm.core.errors import ParameterError
from clinllm.evaluation import calibration, outcomes, statistics, text
from clinllm.run import published, truth, verify as V

@pytest.fixture
def settings(tmp_path): return SimpleNamespace(cache=tmp_path / "cache", root=tmp_path / "project", reports=tmp_path / "reports")

@pytest.fixture
def with_data(settings, shared_data, monkeypatch): monkeypatch.setenv("CLINLLM_DATA", str(shared_data)); return settings

def verdicts(table): return table["verdict"].value_counts().to_dict()

def test_table_6_of_aci_bench(with_data):
    table = V.verify(with_data, "aci-bench", write=False); assert verdicts(table) == {"match": 45}
    expected = pd.read_csv(published._text_set(with_data, "aci-bench") / "expected_table6.csv").set_index("model")      # the figures in the yaml are those of the paper
    for r in table.itertuples(): row, metric = r.check.rsplit(": ", 1); assert expected.loc[row, metric] == r.published

def test_a_wrong_rouge_is_shown_as_wrong(with_data, monkeypatch):
    right = text.rouge; monkeypatch.setattr(text, "rouge", lambda a, b: right(a, b).assign(rougeLsum=lambda f: f["rougeL"]))      # the wrong one of the two ROUGE-L
    table = V.verify(with_data, "aci-bench", write=False)
    assert verdicts(table)["differs"] >= 12 and table.loc[table["verdict"] == "differs", "check"].str.endswith("rougeLsum").all()

def test_pubmedqa(with_data):
    table = V.verify(with_data, "pubmedqa", write=False); assert verdicts(table) == {"match": 4}, table["reason"].tolist()

def test_examples_peers_and_privacy_match(settings):
    table = V.verify(settings, ["examples", "peers", "privacy"], write=False)
    assert not (table["verdict"] == "differs").any(), table.loc[table["verdict"] == "differs", ["check", "reason"]].to_string()

@pytest.mark.parametrize("module, name, wrong, group, checks", [
    (statistics, "auroc", lambda f, w: np.full(len(w), .7), "peers", "auroc"), (statistics, "wilson", lambda hits, cluster=None: statistics.Estimate(np.mean(hits), 0., 1., len(hits)), "examples", "Wilson"),
    (outcomes, "model_benefit", lambda t: lambda f, w: w @ f["label"].to_numpy() / w.sum(1), "examples", "net benefit of family"), (calibration, "calibration_slope", lambda f, w: np.ones(len(w)), "peers", "calibration slope")])
def test_a_broken_measure_differs(settings, monkeypatch, module, name, wrong, group, checks):
    monkeypatch.setattr(module, name, wrong); table = V.verify(settings, group, write=False); bad = table[table["verdict"] == "differs"]
    assert len(bad) and bad["check"].str.startswith(checks).any() and bad["reason"].str.contains("must lie between").any()

def test_a_crash_and_a_missing_number_differ_too(settings, monkeypatch):
    def crash(hits, cluster=None): raise ZeroDivisionError("no")
    monkeypatch.setattr(statistics, "wilson", crash); monkeypatch.setattr(statistics, "auroc", lambda f, w: np.full(len(w), np.nan))
    table = V.verify(settings, "examples", write=False).set_index("check")
    assert table.loc["AUROC of CT readings", ["verdict", "reason"]].tolist()[0] == "differs" and "no number" in table.loc["AUROC of CT readings", "reason"]
    assert "ZeroDivisionError" in table.loc["Wilson's interval of 0 in 20: high", "reason"]

def test_what_is_not_here_is_not_checked(settings, monkeypatch):
    monkeypatch.delenv("CLINLLM_DATA", raising=False); table = V.verify(settings, ["aci-bench", "pubmedqa"], write=False)
    assert verdicts(table) == {"not checked": 49} and table["reason"].str.contains("clinllm data get").all() and table["found"].isna().all()
    def absent(*_): raise ImportError("No module named 'opacus'")
    monkeypatch.setattr(published, "classic_epsilon", absent); table = V.verify(settings, "privacy", write=False)
    assert (table["verdict"] == "not checked").sum() == 6 and table["reason"].str.contains("pip install").sum() == 6

def test_a_group_that_cannot_be_set_up_is_one_line_that_differs(settings, monkeypatch):
    monkeypatch.setitem(V.GROUPS, "peers", ("", lambda *_: 1 / 0)); table = V.verify(settings, "peers", write=False)
    assert len(table) == 1 and table["verdict"][0] == "differs" and "ZeroDivisionError" in table["reason"][0]

def test_the_report(settings, monkeypatch):
    monkeypatch.setattr(outcomes, "treat_all_benefit", lambda t: lambda f, w: np.zeros(len(w))); table = V.verify(settings, "examples", seeds=7); folder = settings.reports / "verify"
    data = json.loads((folder / "verify.json").read_text()); page, words = (folder / "verify.html").read_text(), (folder / "verify.md").read_text()
    assert data["counts"]["differs"] == 6 and data["seeds"] == 7 and len(data["checks"]) == len(table) and data["message"] == V.message_verify(table) == f"6 of {len(table)} figures differ."
    assert page.count('<tr class="differs">') == 6 and words.splitlines()[0] == f"# {data['message']}" and words.splitlines()[9].startswith("| differs") and {p.name for p in folder.iterdir()} == {"verify.json", "verify.md", "verify.html"}

@pytest.mark.parametrize("counts, said", [((3, 0, 0), "All 3 figures match."), ((2, 1, 0), "1 of 3 figures differ."), ((2, 0, 1), "No figure differs among the 2 that were checked; 1 of 3 were not checked.")])
def test_the_message(counts, said): assert V.message_verify(pd.DataFrame(dict(verdict=np.repeat(published.VERDICTS, counts)))) == said

def test_refused(settings):
    with pytest.raises(ParameterError, match="did you mean|truth"): V.verify(settings, "thruth")
    with pytest.raises(ParameterError, match="2 or more"): V.verify(settings, seeds=1)

def test_truth_by_hand():
    "The population's truth agrees with its own rows, counted another way"
    f, t = truth.population(), truth.truths(); alert = f["y_prob"] >= truth.THRESHOLD; hits, false = (alert & (f["label"] == 1)).sum(), (alert & (f["label"] == 0)).sum()
    assert t["net_benefit"] == pytest.approx(hits / len(f) - false / len(f) * .25) and t["sensitivity"] == pytest.approx(hits / f["label"].sum()) and t["alerts_per_100"] == pytest.approx(100 * (hits + false) / len(f))
    assert t["number_needed_to_evaluate"] == pytest.approx((hits + false) / hits) and f["subject_id"].is_monotonic_increasing
    assert t["calibration_intercept"] == pytest.approx(0, abs=1e-6) and t["calibration_slope"] < .9 and t["auroc_difference"] > .05      # level, too sure of itself, the note helps: as planted

def test_coverage_tells_an_interval_that_is_too_narrow(monkeypatch):
    right = statistics.interval; monkeypatch.setattr(statistics, "interval", lambda v, r, n, *a: (lambda e: e._replace(low=e.value - (e.value - e.low) / 3, high=e.value + (e.high - e.value) / 3))(right(v, r, n, *a)))
    wrong = truth.coverage(seeds=24, n=200, n_boot=60, again=12).set_index("kind"); assert wrong.loc[["auroc", "brier_loss", "text_score"], "covered"].mean() < .75       # 49% is expected
    assert wrong.loc["sensitivity, one row each", "covered"] > .8

def test_injected_differences_have_the_stated_size():
    for name in truth.INJECTED:
        size, amount = truth.injected(name); column, value, measure, true, inject, *_ = truth.INJECTED[name]
        f = truth.population().assign(row=np.arange(len(truth.population()))); f["group"] = (f[column] == value).astype(int)
        assert true(f, inject(f, amount)) == pytest.approx(size, abs=1e-3) and .02 < abs(size) < .9
