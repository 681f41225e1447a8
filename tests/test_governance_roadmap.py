"Each verdict from numbers that were judged by hand, and the rule that synthetic evidence never passes."
import itertools
from dataclasses import replace

import pandas as pd
import pytest

from clinllm.core.errors import SettingsError
from clinllm.core.settings import SCHEMA
from clinllm.core.tables import Estimate, claim, concat
from clinllm.governance.ledger import LEDGER_COLUMNS
from clinllm.governance.roadmap import REHEARSED, RULES, STATUSES, VERDICTS, Criterion, check, combine, gate_figure, gate_header, gate_table, judge, load_gates, roadmap_strip, verdict

LIMITS = dict(SCHEMA["gates"])
GATES, CANDIDATES = load_gates()
GATE = {g.gate: g for g in GATES}


def ledger(*claims, data="ours", kind="real", experiment="evaluation"):
    frame = concat(claims).frame.assign(experiment=experiment, data=data, kind=kind, run_id="r", finished=pd.Timestamp("2026-01-01", tz="UTC"), folder="r")
    return frame[LEDGER_COLUMNS]


def g3(auroc=(.75, .71, .79), slope=(1., .9, 1.1), gain=(.03, .01, .05), gap=(.04, .0, .09), drop=(.01, .0, .03), n=400, variant="lora", **where):
    return ledger(claim("clinical accuracy", "auroc", variant, Estimate(*auroc, n)),
                  claim("calibration", "calibration_slope", f"{variant} (recalibrated)", Estimate(*slope, n)),
                  claim("patient outcomes", "net_benefit_gain", variant, Estimate(*gain, n), group="threshold 0.25"),
                  claim("fairness", "auroc_gap", variant, Estimate(*gap, n), group="sex"),
                  claim("robustness", "auroc_drop", variant, Estimate(*drop, n), group="typos 10%"), **where)


def judged(rows): return judge(GATE["G3"], rows, LIMITS, CANDIDATES)


def test_pass_with_conditions_because_people_have_not_rated():
    j = judged(g3())
    assert j.verdict == "pass with conditions" and j.passed and any("rated" in r for r in j.reasons)


def test_pass_needs_everything():
    gate = replace(GATE["G3"], criteria=tuple(c for c in GATE["G3"].criteria if c.metric and c.required))
    assert judge(gate, g3(), LIMITS, CANDIDATES).verdict == "pass"
    gate = replace(gate, criteria=tuple(c for c in GATE["G3"].criteria if c.metric))       # nobody asked about swaps, orders or reviews
    assert judge(gate, g3(), LIMITS, CANDIDATES).verdict == "pass with conditions"


@pytest.mark.parametrize("bad, expected", [
    (dict(auroc=(.60, .55, .65)), "stop"),              # wholly below 0.70
    (dict(auroc=(.75, .65, .85)), "re-review"),         # the value is above, the interval lies across
    (dict(slope=(.5, .3, .7)), "stop"),                 # wholly below 0.8
    (dict(slope=(1., .7, 1.3)), "re-review"),
    (dict(gain=(.0, -.02, .02)), "re-review"),
    (dict(gain=(-.04, -.06, -.01)), "stop"),
    (dict(gap=(.2, .12, .3)), "stop"),
    (dict(gap=(.05, .0, .15)), "re-review"),
    (dict(drop=(.1, .06, .2)), "stop"),
    (dict(n=99), "re-review"),                          # below min_patients, whatever the numbers say
])
def test_one_weak_number_changes_the_verdict(bad, expected):
    assert judged(g3(**bad)).verdict == expected


def test_too_few_patients_cannot_even_stop_a_gate():
    assert judged(g3(auroc=(.4, .3, .5), n=50)).verdict == "re-review"


def test_a_withheld_value_is_no_evidence():
    rows = g3(); rows.loc[rows["metric"] == "auroc_gap", ["value", "low", "high"]] = float("nan")
    assert judged(rows).verdict == "re-review"


def test_synthetic_evidence_rehearses_and_never_passes():
    for changes in ({}, dict(auroc=(.99, .98, 1.)), dict(auroc=(.60, .55, .65)), dict(n=5)):
        j = judged(g3(kind="synthetic", data="synthetic", **changes))
        assert j.verdict == "no evidence" and not j.passed and j.rehearsal.startswith("rehearsed: would")


def test_good_synthetic_numbers_do_not_help_bad_real_ones():
    both = pd.concat([g3(kind="synthetic", data="synthetic"), g3(auroc=(.6, .55, .65))])
    j = judged(both)
    assert j.verdict == "stop" and j.rehearsal == "rehearsed: would pass with conditions"


def test_the_strictest_real_source_decides():
    assert judged(pd.concat([g3(data="a"), g3(data="b", n=10)])).verdict == "re-review"


def test_the_second_candidate_is_judged_where_the_first_was_not_evaluated():
    rows = judged(g3(variant="late_fusion")).rows
    assert set(rows["variant"]) - {""} == {"late_fusion", "late_fusion (recalibrated)"}
    assert judged(pd.concat([g3(), g3(variant="late_fusion", auroc=(.5, .4, .6))])).verdict == "pass with conditions"


def test_other_thresholds_of_action_are_not_counted():
    rows = g3(); rows.loc[rows["metric"] == "net_benefit_gain", "group"] = "threshold 0.30"
    assert judged(rows).verdict == "re-review"


def test_no_ledger_at_all():
    empty = pd.DataFrame(columns=LEDGER_COLUMNS)
    for g in GATES:
        j = judge(g, empty, LIMITS, CANDIDATES)
        assert (j.verdict, j.rehearsal) == ("no evidence", "no evidence") and gate_figure(j, LIMITS) is None
        assert set(j.rows["criterion"]) == {c.id for c in g.criteria} and "no evidence" in gate_table(j).data and g.A in gate_header(j).data


def test_verdict_never_improves_when_a_status_gets_worse():
    must, may = Criterion("a", "A", True), Criterion("b", "B", False)
    rank = {"met": 0, "undecided": 1, "too few": 1, "no evidence": 1, "not met": 2}
    order = {"pass": 0, "pass with conditions": 1, "re-review": 2, "no evidence": 2, "stop": 3}
    for a, b in itertools.product(STATUSES, STATUSES):
        for worse in (s for s in STATUSES if rank[s] > rank[a]):
            assert order[verdict([must, may], dict(a=worse, b=b))[0]] >= order[verdict([must, may], dict(a=a, b=b))[0]]


def test_wider_intervals_never_help():
    c = Criterion("c", "C", True, metric="m", rule="low_at_least", threshold="min_auroc")
    assert [check(c, Estimate(.8, .8 - w, .8 + w, 400), LIMITS) for w in (.05, .1, .2)] == ["met", "met", "undecided"]


def test_thresholds_of_the_settings_decide():
    c = Criterion("c", "C", True, metric="m", rule="low_at_least", threshold="min_auroc")
    e = Estimate(.75, .71, .79, 400)
    assert check(c, e, LIMITS | dict(min_auroc=.70)) == "met" and check(c, e, LIMITS | dict(min_auroc=.72)) == "undecided" and check(c, e, LIMITS | dict(min_auroc=.8)) == "not met"


def test_combine_is_order_free():
    for a in itertools.product(STATUSES, repeat=2): assert combine(a) == combine(a[::-1])


def test_gates_file_says_what_it_must():
    assert [g.gate for g in GATES] == [f"G{k}" for k in range(7)]
    for g in GATES:
        assert g.R and g.A and g.C and g.I and g.asks and g.why and g.artefacts and g.maps
        for c in g.criteria: assert c.metric or c.missing, f"{c.id} has neither a measure nor what to do"
    assert {"deid_recall", "dp_epsilon", "canary_exposure", "human_ai_agreement", "drift_monitor"} <= {c.id for g in GATES for c in g.criteria if not c.metric}
    assert set(REHEARSED) == set(VERDICTS) and not any(v in VERDICTS and v != "no evidence" for v in REHEARSED.values())


def test_a_wrong_gates_file_is_refused(tmp_path):
    for text in ("gates: 3", "{", "gates: [{gate: G0}]\ncandidates: []", "candidates: [x]"):
        (tmp_path / "g.yaml").write_text(text)
        with pytest.raises(SettingsError): load_gates(tmp_path / "g.yaml")
    with pytest.raises(SettingsError, match="threshold"): Criterion("x", "x", True, metric="m", rule=next(iter(RULES)))


def test_every_gate_has_its_chapter():
    from clinllm.core.settings import project_root
    for g in GATES: assert (project_root() / "nbs" / "roadmap" / f"{g.page}.ipynb").exists()
    strip = roadmap_strip([judge(g, pd.DataFrame(columns=LEDGER_COLUMNS), LIMITS, CANDIDATES) for g in GATES], "roadmap/").data
    assert strip.count("gate-tile") == 7 and "roadmap/g0_problem_and_fit." in strip
