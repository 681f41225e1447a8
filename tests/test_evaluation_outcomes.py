"Outcomes against dcurves, hand-worked tables and closed forms."
import time
import numpy as np, pandas as pd, pytest
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.outcomes import (LOAD, alert_load, alerts_per_100, benefit_gain, by_patient, daily_alerts, expected_utility, implied_threshold, lead_time, lead_time_plot, lead_times, load_plot, message_lead_time,
    message_load, message_sensitivity, model_benefit, moved_dates, net_benefit, net_intervention_avoided, number_needed_to_evaluate, sensitivity_plot, sensitivity_table, weighted_quantile)
from clinllm.evaluation.statistics import WORST, answered, bootstrap_many, simulate

def table(y, p, **more):
    return Predictions(pd.DataFrame(dict(subject_id=range(len(y)), prediction_time=pd.Timestamp("2024-01-01"), variant="m", label=y, y_prob=p) | more))

def values(evidence): return evidence.frame.set_index(["metric", "variant", "group"]).sort_index()

def with_failures(rows=3):
    f = simulate(200, rows=rows).frame; f.loc[f.index[5:30], ["status", "y_prob"]] = ["refused", np.nan]; return Predictions(f)

def test_net_benefit_equals_dcurves():
    dca = pytest.importorskip("dcurves").dca; rng = np.random.default_rng(0); grid = [.05, .1, .25, .5, .75]
    d = pd.DataFrame(dict(y=rng.integers(0, 2, 300), a=rng.integers(0, 41, 300) / 40, b=rng.random(300)))       # `a` has ties, also at thresholds
    peer = dca(d, "y", ["a", "b"], thresholds=grid).set_index(["model", "threshold"])
    ours = net_benefit(Predictions(pd.concat([table(d["y"], d[v]).frame.assign(variant=v) for v in "ab"])), grid, n_boot=20).frame; ours["threshold"] = ours["group"].str.split().str[1].astype(float)
    for name, v in {"a": "a", "b": "b", "all": "treat all", "none": "treat none"}.items():
        for metric in ("net_benefit", "net_intervention_avoided"):
            mine = ours[(ours["variant"] == v) & (ours["metric"] == metric)]
            for r in mine.itertuples(): assert r.value == pytest.approx(peer.loc[(name, r.threshold), metric], abs=1e-12)

@pytest.mark.parametrize("weighted", [False, True])
def test_the_quick_way_says_what_the_plain_way_says(weighted):
    p = with_failures(); p = Predictions(p.frame.assign(weight=1 + p.frame["subject_id"] % 4)) if weighted else p
    found = values(net_benefit(p, [.4, .1, .2], n_boot=100))
    for v in p.variants:
        frame, said = answered(p, v)
        for t in (.1, .2, .4):
            plain = bootstrap_many(frame, dict(net_benefit=model_benefit(t), net_benefit_gain=benefit_gain(t), alerts_per_100=alerts_per_100(t), number_needed_to_evaluate=number_needed_to_evaluate(t), net_intervention_avoided=net_intervention_avoided(t)), 100)
            for m, e in plain.items():
                row = found.loc[(m, v, f"threshold {t:.2f}")]; np.testing.assert_allclose(row[["value", "low", "high"]].to_numpy(dtype=float), e[:3], atol=1e-12)
                assert row["n"] == len(frame) and said in row["limitation"]

def test_whole_number_weights_are_repeated_rows():
    rng = np.random.default_rng(1); y, p, w = rng.integers(0, 2, 60), rng.random(60).round(1), rng.integers(1, 4, 60)
    one, many = net_benefit(table(y, p, weight=w), [.3], n_boot=20).frame, net_benefit(table(np.repeat(y, w), np.repeat(p, w)), [.3], n_boot=20).frame
    np.testing.assert_allclose(one["value"], many["value"])
    u = dict(true_alert=3, false_alert=-1, missed=-2, quiet=.1)
    np.testing.assert_allclose(expected_utility(table(y, p, weight=w), .3, u, n_boot=20).frame["value"], expected_utility(table(np.repeat(y, w), np.repeat(p, w)), .3, u, n_boot=20).frame["value"])

def test_patients_become_lines_by_hand():
    frame = pd.DataFrame(dict(subject_id=[7, 7, 3], label=[1, 0, 1], y_prob=[.2, .5, .1]))
    names, counts = by_patient(frame, [.2, .5])
    assert names.tolist() == [3, 7] and counts[:, 0].tolist() == [[1, 0, 0], [1, 1, 0]] and counts[:, 1].tolist() == [[0, 0, 0], [1, 1, 1]]      # a probability at the threshold alerts

def test_failures_are_left_out_and_shown_as_wrong():
    y, p = [1, 1, 0, 0], [.9, np.nan, .1, np.nan]; d = table(y, p, status=["ok", "error", "ok", "refused"])
    found = values(net_benefit(d, [.5], n_boot=20))
    assert found.loc[("net_benefit", "m", "threshold 0.50"), "value"] == .5 and found.loc[("net_benefit", "m", "threshold 0.50"), "n"] == 2
    worst = found.loc[("net_benefit", "m", f"{WORST}, at 0.50")]                      # one true alert, one missed, one false, one quiet: (1 - 1) / 4
    assert worst["value"] == 0 and worst["n"] == 4 and "counted as wrong" in worst["limitation"]
    assert found.loc[("net_benefit", "treat all", "threshold 0.50"), "n"] == 4
    assert not net_benefit(table(y, [.9, .8, .1, .2]), [.5], n_boot=20).frame["group"].str.contains(WORST).any()

@pytest.mark.parametrize("d", [table([0] * 40, [.3] * 40), table([1] * 40, [.3] * 40), table([1], [.9]), table([0, 1], [np.nan] * 2, status="refused"), table([0, 1, 1], [.2] * 3)], ids=["no case", "only cases", "n = 1", "all refused", "ties"])
def test_edges_are_missing_with_a_reason(d):
    u = dict(true_alert=3, false_alert=-1, missed=-2, quiet=0)
    for e in (net_benefit(d, [.2, .5], n_boot=20), alert_load(d, .2, n_boot=20), lead_time(Predictions(d.frame.assign(event=pd.NaT)), .2, "event", n_boot=20), expected_utility(d, .2, u, n_boot=20)):
        assert (e.frame.loc[e.frame["value"].isna(), "limitation"] != "").all() and not (e.frame["value"].isna() & e.frame["low"].notna()).any()

def test_edge_values():
    none = values(net_benefit(table([0] * 40, [.3] * 40), [.2], n_boot=20))
    assert none.loc[("net_benefit", "m", "threshold 0.20"), "value"] == pytest.approx(-.25) and np.isnan(none.loc[("number_needed_to_evaluate", "m", "threshold 0.20"), "value"])
    refused = values(net_benefit(table([0, 1], [np.nan] * 2, status="refused"), [.2], n_boot=20))
    assert np.isnan(refused.loc[("net_benefit", "m", "threshold 0.20"), "value"]) and refused.loc[("net_benefit", "treat all", "threshold 0.20"), "value"] == pytest.approx(.5 - .5 * .25)

def test_thresholds_in_any_order_and_twice():
    p = simulate(60); found = net_benefit(p, [.3, .1, .3], n_boot=20).frame; groups = found.loc[(found["metric"] == "net_benefit") & (found["variant"] == "noisy"), "group"]
    assert groups.tolist() == ["threshold 0.30", "threshold 0.10", "threshold 0.30"]
    assert net_benefit(p, [.125, .25], n_boot=20).frame["group"].unique().tolist() == ["threshold 0.125", "threshold 0.25"]
    for wrong in ([], [0], [1], [20]):
        with pytest.raises(ParameterError): net_benefit(p, wrong)

def test_ten_thresholds_take_a_moment():
    p = Predictions(simulate(900).frame.query("variant != 'constant'")); start = time.process_time()
    net_benefit(p, np.linspace(.05, .5, 10)); assert time.process_time() - start < 2

def test_alerts_a_day_by_hand():
    at = pd.to_datetime(["2024-01-01 08:00", "2024-01-03 09:30", "2024-01-03 23:59", "2024-01-05 00:00", "2024-01-05 01:00"])
    d = Predictions(pd.DataFrame(dict(subject_id=range(5), prediction_time=at, variant="m", label=0, y_prob=[.9, .9, .9, .9, .1], los=[2., 3, 1, 2, 2])))
    found = alert_load(d, .5, beds=40, n_boot=200).frame.set_index("metric")                    # 1, 0, 2, 0, 1 alerts: 0.8 a day
    assert found.loc[LOAD, "value"] == pytest.approx(2) and found.loc["alerts_on_a_high_day", "value"] == pytest.approx(5) and found.loc[LOAD, "n"] == 5
    assert alert_load(d, .5, beds=40, share=.5, n_boot=20).frame["value"].iloc[0] == pytest.approx(4)
    assert alert_load(d, .5, beds=40, days=10, n_boot=20).frame["value"].tolist() == [pytest.approx(1)]
    assert alert_load(d, .5, patient_days="los", n_boot=20).frame["value"].tolist() == [pytest.approx(40)]          # 4 alerts in 10 patient-days
    assert alert_load(Predictions(d.frame.assign(weight=2.)), .5, beds=40, n_boot=20).frame["value"].iloc[0] == pytest.approx(4)
    assert alert_load(Predictions(d.frame.assign(weight=2.)), .5, beds=40, days=10, n_boot=20).frame["value"].iloc[0] == pytest.approx(2)

def test_alert_load_refuses_what_it_cannot_know():
    p = simulate(30); moved = Predictions(p.frame.assign(prediction_time=lambda d: d["prediction_time"] + pd.to_timedelta(3650 * (d["subject_id"] % 9), unit="D")))
    assert "80 years" in moved_dates(moved.frame) and alert_load(moved, .3).frame["value"].isna().all() and "moved" in alert_load(moved, .3).frame["limitation"].iloc[0]
    assert alert_load(moved, .3, days=100, n_boot=20).frame["value"].notna().all()
    with pytest.raises(TableError): daily_alerts(moved.frame, .3)
    for wrong in (dict(beds=0), dict(share=0), dict(share=2), dict(days=0), dict(threshold=2)):
        with pytest.raises(ParameterError): alert_load(p, **(dict(threshold=.3) | wrong))
    with pytest.raises(TableError, match="patient_day"): alert_load(p, .3, patient_days="patient_day")
    with pytest.raises(TableError, match="above 0"): alert_load(Predictions(p.frame.assign(los=0)), .3, patient_days="los")

def test_alert_load_interval_holds_the_rate():
    "Alerts come as a Poisson process, 3 on a weekday and 1 on a Sunday or Saturday; its mean is (15 + 2) / 7 a day"
    held = []
    for s in range(40):
        rng = np.random.default_rng(s); per = rng.poisson([3, 3, 3, 3, 3, 1, 1] * 26); day = np.repeat(np.arange(182), per)
        d = Predictions(pd.DataFrame(dict(subject_id=range(len(day)), prediction_time=pd.Timestamp("2024-01-01") + pd.to_timedelta(day * 1440 + rng.integers(0, 1440, len(day)), unit="min"), variant="m", label=0, y_prob=.9)))
        e = alert_load(d, .5, n_boot=200, seed=s).frame.iloc[0]; held.append(e["low"] <= 17 / 7 <= e["high"])
    assert np.mean(held) >= .85

def test_lead_time_by_hand():
    noon = pd.Timestamp("2024-01-01 12:00"); clock = lambda h: pd.Timestamp("2024-01-01") + pd.to_timedelta(h, unit="h")
    d = Predictions(pd.DataFrame(dict(subject_id=[1, 1, 1, 2, 3, 3, 4, 5, 6], variant="m", label=[1, 1, 1, 1, 1, 1, 0, 1, 1], prediction_time=clock([2, 5, 11, 6, 4, 12, 4, 4, 9]),
        y_prob=[.9, .1, .9, .5, .1, .9, .9, .9, .8], event=[noon] * 6 + [pd.NaT, pd.NaT, noon])))
    per = lead_times(d.frame, .5, "event").set_index("subject_id")["hours"]
    assert per[1] == 10 and per[2] == 6 and np.isnan(per[3]) and per[6] == 3 and len(per) == 4      # at the event itself is too late; 4 has none, 5's time is unknown
    found = lead_time(d, .5, "event", n_boot=50).frame.set_index("metric")
    assert found.loc["lead_time_hours", "value"] == 6 and found.loc["lead_time_hours", "n"] == 3 and found.loc["events_warned", "value"] == .75 and "2 rows" in found.loc["events_warned", "limitation"]
    with pytest.raises(TableError, match="Did you mean 'event'"): lead_time(d, .5, "events")
    never = lead_time(d, .95, "event", n_boot=50); assert never.frame["value"].iloc[:3].isna().all() and never.frame["value"].iloc[3] == 0 and "no event had an alert" in message_lead_time(never)

def test_lead_time_of_a_known_rise():
    "Risk passes the threshold at a time drawn uniformly from 0 to 20 hours before the event, and is read every minute: the median is 10, quartiles 5 and 15"
    rng = np.random.default_rng(0); n = 2000; ahead = rng.uniform(0, 20, n); event = pd.Timestamp("2024-01-01") + pd.Timedelta(days=2)
    d = Predictions(pd.DataFrame(dict(subject_id=range(n), variant="m", label=1, prediction_time=event - pd.to_timedelta(np.floor(ahead * 60) + 1, unit="min"), y_prob=.9, event=event)))
    found = lead_time(d, .5, "event", n_boot=200).frame
    for r, truth in zip(found.itertuples(), (10, 5, 15)): assert r.low - .1 < truth < r.high + .1

def test_weighted_quantile_is_type_2():
    rng = np.random.default_rng(2); x, w = rng.normal(size=30), rng.integers(0, 3, (50, 30)).astype(float)
    for q in (.05, .25, .5, .95): np.testing.assert_allclose(weighted_quantile(x, w, q), [np.quantile(np.repeat(x, v.astype(int)), q, method="averaged_inverted_cdf") for v in w])

def test_utility_that_says_net_benefit_is_net_benefit():
    p = with_failures(1)
    for t in (.1, .25, .6):
        u = dict(true_alert=1, false_alert=-t / (1 - t), missed=0, quiet=0); mine, theirs = values(expected_utility(p, t, u, n_boot=50)), values(net_benefit(p, [t], n_boot=50)); assert implied_threshold(u) == pytest.approx(t)
        for v in p.variants:
            for a, b in (("expected_utility", "net_benefit"), ("expected_utility_gain", "net_benefit_gain")):
                np.testing.assert_allclose(mine.loc[(a, v, f"threshold {t:.2f}"), ["value", "low", "high"]].to_numpy(dtype=float) / 100, theirs.loc[(b, v, f"threshold {t:.2f}"), ["value", "low", "high"]].to_numpy(dtype=float), atol=1e-12)

def test_utility_by_hand_and_its_threshold():
    d = table([1, 1, 1, 0, 0, 0, 0, 0], [.9, .9, .1, .9, .1, .1, .1, .1]); u = dict(true_alert=8, false_alert=-3, missed=-4, quiet=1)
    found = values(expected_utility(d, .5, u, unit="hours", n_boot=50)); at = "threshold 0.50"
    assert found.loc[("expected_utility", "m", at), "value"] == pytest.approx(100 * (2 * 8 - 4 - 3 + 4 * 1) / 8) and found.loc[("expected_utility", "treat all", at), "value"] == pytest.approx(100 * (3 * 8 - 5 * 3) / 8)
    assert found.loc[("expected_utility", "treat none", at), "value"] == pytest.approx(100 * (-3 * 4 + 5) / 8) and found.loc[("expected_utility_gain", "m", at), "value"] == pytest.approx(100 * (13 - 9) / 8)
    assert implied_threshold(u) == pytest.approx(4 / 16) and "acting from 0.25, not 0.50" in found["limitation"].iloc[0] and found["unit"].iloc[0] == "hours per 100 patients"
    assert np.isnan(implied_threshold(dict(u, true_alert=-9)))
    for wrong in ({}, dict(u, quiet=np.nan), dict(u, other=1)):
        with pytest.raises(ParameterError): expected_utility(d, .5, wrong)

def test_break_even_is_where_the_sign_turns():
    p = simulate(500); u = dict(true_alert=8, false_alert=-2, missed=-1, quiet=0)
    for name in u:
        grid = np.linspace(u[name] - 12, u[name] + 12, 241); t = sensitivity_table(p, "true risk", .2, u, {name: grid}, n_boot=20); base, moved = t.iloc[0], t.iloc[1:]; turn = moved["break_even"].iloc[0]
        crossing = grid[:-1][np.diff(np.sign(moved["gain"].to_numpy())) != 0]
        if np.isnan(turn): assert len(crossing) == 0; continue
        if abs(turn - u[name]) < 12: assert np.abs(crossing - turn).min() <= .1 + 1e-9
        assert base["gain"] == pytest.approx(expected_utility(p, .2, u, n_boot=20).frame.query("variant == 'true risk' and metric == 'expected_utility_gain'")["value"].iloc[0])
    with pytest.raises(ParameterError, match="Did you mean 'missed'"): sensitivity_table(p, "true risk", .2, u, {"miss": (1, 2)})
    with pytest.raises(TableError, match="no answered rows"): sensitivity_table(table([0, 1], [np.nan] * 2, status="error"), "m", .2, u, {})

def test_figures_say_what_the_numbers_say():
    import matplotlib; matplotlib.use("Agg"); import matplotlib.pyplot as plt
    p = simulate(100); p = Predictions(p.frame.assign(event=p.frame["prediction_time"] + pd.Timedelta(hours=30), prediction_time=p.frame["prediction_time"] + pd.to_timedelta(p.frame["subject_id"] % 20, unit="h")))
    said = lambda ax: (ax.get_title(loc="left") or ax.get_title()).replace("\n", " ").replace("\xa0", " ")
    load = alert_load(p, .3, n_boot=50); assert said(load_plot(p, .3, n_boot=50)) == message_load(load) and f"{load.frame['value'].iloc[0]:.1f}" in message_load(load)
    ahead = lead_time(p, .3, "event", n_boot=50); assert said(lead_time_plot(p, .3, "event", n_boot=50)) == message_lead_time(ahead)
    t = sensitivity_table(p, "noisy", .3, dict(true_alert=3, false_alert=-1, missed=0, quiet=0), {"missed": (-2, -1)}, n_boot=50); assert said(sensitivity_plot(t)) == message_sensitivity(t) and "n=100" in message_sensitivity(t)
    gone = Predictions(p.frame.assign(y_prob=np.nan, status="error")); load_plot(gone, .3, n_boot=20); lead_time_plot(gone, .3, "event", n_boot=20)
    assert "own" in said(load_plot(p, .3, title="own", n_boot=20)); plt.close("all")
