"The capacity simulation against days worked by hand, a plain day loop, and closed forms."
import numpy as np, pandas as pd, pytest
from scipy.stats import poisson
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.capacity import (DAY, break_even_capacity, capacity_curve, capacity_plot, first_round, message_capacity, message_queue, other_periods, queue_plot, recorded_period, run_queues, simulate_capacity)
from clinllm.evaluation.outcomes import net_benefit
from clinllm.evaluation.statistics import simulate

def arrive(p, days=90, seed=0):
    "The same patients, arriving at random over some days"
    n = p.frame["subject_id"].nunique(); at = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.random.default_rng(seed).integers(0, days * DAY, n), unit="min")
    return Predictions(p.frame.assign(prediction_time=at[p.frame["subject_id"]]))

def of(evidence, variant, group=None):
    f = evidence.frame; f = f[(f["variant"] == variant) & (f["group"].str.contains(group, regex=False) if group else True)]; return f.set_index("metric")

def plain_day_loop(minute, risk, days, capacity, order, wait_days, round_hour):
    "The same rules without a clock: for each day, list who may be seen, sort, cut"
    seen, left = [np.nan] * len(minute), set(range(len(minute)))
    for day in range(days + wait_days + 1):
        now = day * DAY + round_hour * 60
        may = [i for i in left if now - (wait_days + 1) * DAY <= minute[i] < now]        # raised since the last round, or waiting no longer than allowed
        may = sorted(may, key=(lambda i: (-risk[i], i)) if order == "highest risk" else (lambda i: i))
        for i in may[:capacity]: seen[i] = day; left.remove(i)
    return np.array(seen)

@pytest.mark.parametrize("order", ["highest risk", "first come"])
@pytest.mark.parametrize("wait_days, round_hour", [(0, 24), (1, 24), (3, 8), (0, 12)])
def test_queue_equals_a_plain_day_loop(order, wait_days, round_hour):
    for s in range(8):
        rng = np.random.default_rng(s); n, k = 60, int(rng.integers(1, 5)); minute = np.sort(rng.integers(0, 15 * 24, n)) * 60; risk = rng.integers(0, 6, n) / 5       # many ties, many alerts at a round's very minute
        (seen, log), = run_queues(minute, risk, 15, [(k, order)], wait_days, round_hour)
        np.testing.assert_array_equal(seen, plain_day_loop(minute, risk, 15, k, order, wait_days, round_hour))
        log = np.array(log); assert log[:, 1].sum() == n == log[:, 2].sum() + log[:, 3].sum() and (log[:, 2] <= k).all() and log[-1, 4] == 0 and log[:, 2].sum() == (~np.isnan(seen)).sum()

def test_a_day_worked_by_hand():
    """Five alerts on Monday, one on Tuesday, room for two, threshold 0.5 (odds 1). Highest risk first sees .9 (true) and .8 (false) on Monday.
    Those left over (.7 true, .6 false, .55 true) may wait a day: on Tuesday .95 (true) and .7 (true) are seen. 3 true, 1 false of 8 patients: (3 - 1) / 8."""
    d = Predictions(pd.DataFrame(dict(subject_id=range(8), variant="m", label=[1, 0, 1, 0, 1, 1, 0, 0], y_prob=[.55, .6, .7, .8, .9, .95, .1, .2],
        prediction_time=pd.to_datetime(["2024-01-01 08:00", "2024-01-01 09:00", "2024-01-01 10:00", "2024-01-01 11:00", "2024-01-01 12:00", "2024-01-02 09:00", "2024-01-01 08:30", "2024-01-02 10:00"]))))
    got = simulate_capacity(d, 2, .5, wait_days=1, n_boot=20); value = of(got.evidence, "m")["value"]
    assert value["achieved_net_benefit"] == pytest.approx(2 / 8) and value["net_benefit_lost"] == pytest.approx((4 - 2 - 2) / 8) and value["true_alerts_missed"] == pytest.approx(1 / 4)
    assert got.trace.set_index("subject_id")["seen"].reindex([4, 3, 5, 2]).tolist() == [0, 0, 1, 1] and got.trace["seen"].isna().sum() == 2
    assert got.rounds[["raised", "seen", "dropped", "waiting"]].to_numpy().tolist() == [[5, 2, 0, 3], [1, 2, 2, 0], [0, 0, 0, 0]]
    assert of(simulate_capacity(d, 2, .5, wait_days=1, fade=.5, effect=.8, n_boot=20).evidence, "m")["value"]["achieved_net_benefit"] == pytest.approx((.8 + .8 + .4 - 1) / 8)      # one of the three true waited a round
    first = of(simulate_capacity(d, 2, .5, order="first come", n_boot=20).evidence, "m")["value"]                     # Monday: .55 true, .6 false; Tuesday: .95 true
    assert first["achieved_net_benefit"] == pytest.approx(1 / 8) and first["visits_per_day"] == 1.5 and first["rounds_full"] == .5 and first["queue_length"] == 0
    assert of(simulate_capacity(d, 2, .5, n_boot=20).evidence, "treat all")["value"]["achieved_net_benefit"] == pytest.approx((1 + 1 - 1 - 1) / 8)        # by time: 0 and 6 on Monday (true, false), 5 and 7 on Tuesday

@pytest.mark.parametrize("effect", [1, .4, 0])
def test_without_a_limit_it_is_net_benefit(effect):
    p = arrive(simulate(300)); t = .3; closed = net_benefit(p, [t], n_boot=20).frame.set_index(["metric", "variant"])["value"]
    for order in ("highest risk", "first come"):
        got = simulate_capacity(p, np.inf, t, effect, order, n_boot=20).evidence
        for v in p.variants:
            frame = p.of(v); alert = frame["y_prob"] >= t; tp, fp = (alert & (frame["label"] == 1)).mean(), (alert & (frame["label"] == 0)).mean()
            assert of(got, v)["value"]["achieved_net_benefit"] == pytest.approx(effect * tp - fp * t / (1 - t), abs=1e-12)
            if effect == 1: assert of(got, v)["value"]["achieved_net_benefit"] == pytest.approx(closed["net_benefit", v], abs=1e-12) and of(got, v)["value"]["achieved_net_benefit_gain"] == pytest.approx(closed["net_benefit_gain", v], abs=1e-12)

def test_random_arrivals_equal_the_closed_form():
    "First come, no waiting: alerts of a day are Poisson, min(alerts, k) are seen, and each is worth the mean alert"
    p = Predictions(simulate(400).of("true risk")); t, rate, k = .3, 12, 3; f = p.frame; alert = f["y_prob"] >= t; share, worth = alert.mean(), np.where(f["label"] == 1, 1, -t / (1 - t))[alert].mean()
    j = np.arange(60); visits = (np.minimum(j, k) * poisson.pmf(j, rate * share)).sum()
    got = of(simulate_capacity(p, k, t, order="first come", arrivals_per_day=rate, days=100, n_boot=120).evidence, "true risk")
    assert got.loc["visits_per_day", "value"] == pytest.approx(visits, rel=.02)
    assert got.loc["achieved_net_benefit", "value"] == pytest.approx(visits / rate * worth, abs=.006) and got.loc["achieved_net_benefit", "low"] < visits / rate * worth < got.loc["achieved_net_benefit", "high"]

def test_highest_risk_among_two_a_day_by_closed_form():
    "Two alerts every day, one place: the better of two uniform risks is 2/3 on average, and the outcome is drawn from it"
    rng = np.random.default_rng(0); days = 4000; risk = rng.random(2 * days); d = Predictions(pd.DataFrame(dict(subject_id=range(2 * days), variant="m", y_prob=risk * .999 + .0005, label=(rng.random(2 * days) < risk).astype(int),
        prediction_time=pd.Timestamp("2015-01-01") + pd.to_timedelta(np.repeat(np.arange(days), 2) * DAY + rng.integers(0, DAY, 2 * days), unit="min"))))
    t = .0005; odds = t / (1 - t)
    for order, p in (("highest risk", 2 / 3), ("first come", 1 / 2)):
        assert of(simulate_capacity(d, 1, t, order=order, n_boot=0).evidence, "m")["value"]["achieved_net_benefit"] == pytest.approx((p - (1 - p) * odds) / 2, abs=.012)

def test_more_room_is_never_worse_where_every_alert_pays():
    p = arrive(Predictions(simulate(300).of("true risk").assign(y_prob=lambda d: np.where(d["label"] == 1, .6 + d["y_prob"] / 3, .1))))
    found, runs = capacity_curve(p, [0, 1, 2, 3, 20], .5, n_boot=20); at = lambda k, o: of(found, "true risk", f"capacity {k} a day, {o}")["value"]["achieved_net_benefit"]
    for o in ("highest risk", "first come"): assert 0 == at(0, o) < at(1, o) < at(2, o) <= at(3, o) <= at(20, o) == pytest.approx(p.frame["label"].mean())
    assert at(1, "highest risk") == pytest.approx(at(1, "first come"))      # all alerts are true, so order cannot matter
    assert set(found.frame["group"].str.extract(r"capacity (\d+) a day")[0].dropna()) == {"0", "1", "2", "3", "20"} and found.frame["group"].str.contains("no limit").any()

def test_weekends_without_a_team():
    p = arrive(simulate(200), days=70); closed = simulate_capacity(p, (9, 9, 9, 9, 9, 0, 0), .3, n_boot=20)
    assert (closed.rounds.loc[closed.rounds["day"] % 7 >= 5, "seen"] == 0).all() and closed.rounds["seen"].sum() > 0 and closed.evidence.frame["group"].str.contains("capacity 45 a week").all()

def test_periods_keep_the_hour_the_weekday_and_the_days():
    p = arrive(Predictions(simulate(200).of("noisy")), days=100); period = recorded_period(p.frame); assert period.days == 100 and (np.diff(period.minute) >= 0).all()
    before = dict(zip(period.row, period.minute)); counts = []
    for other in other_periods(period, 30, 1):
        assert (np.diff(other.minute) >= 0).all() and other.days == 98 and other.minute.max() < 98 * DAY
        assert all((m - before[r]) % (7 * DAY) == 0 for r, m in zip(other.row, other.minute)); counts.append(len(other.row))
    assert np.mean(counts) == pytest.approx((period.minute < 98 * DAY).sum(), rel=.05) and np.std(counts) > 0
    assert not list(other_periods(recorded_period(p.frame.assign(prediction_time=pd.Timestamp("2024-01-01"))), 5, 1))

def test_edges():
    p = arrive(simulate(60)); single = Predictions(p.of("noisy").iloc[:1].assign(y_prob=.9)); e = simulate_capacity(single, 1, .3, n_boot=20).evidence.frame
    assert e["low"].isna().all() and e["limitation"].str.contains("no interval|undefined").all()
    refused = Predictions(p.of("noisy").assign(y_prob=np.nan, status="refused")); gone = simulate_capacity(refused, 1, .3, n_boot=20)
    assert gone.evidence.frame["value"].isna().all() and "no rows were answered" in gone.evidence.frame["limitation"].iloc[0] and gone.trace.empty and gone.rounds.empty
    moved = Predictions(p.frame.assign(prediction_time=p.frame["prediction_time"] + pd.to_timedelta(3650 * (p.frame["subject_id"] % 9), unit="D"))); found, runs = capacity_curve(moved, [1], .3, n_boot=20)
    assert found.frame["value"].isna().all() and "moved" in found.frame["limitation"].iloc[0] and runs.empty and not len(break_even_capacity(runs)) and "unknown" in message_capacity(found)
    assert simulate_capacity(moved, 1, .3, arrivals_per_day=3, days=20, n_boot=20).evidence.frame["value"].notna().any()
    quiet = simulate_capacity(Predictions(p.of("noisy").assign(y_prob=.1)), 1, .3, n_boot=20); assert of(quiet.evidence, "noisy")["value"]["achieved_net_benefit"] == 0 and "nobody with the outcome" in of(quiet.evidence, "noisy")["limitation"]["true_alerts_missed"]
    one_class = simulate_capacity(Predictions(p.frame.assign(label=0)), 1, .3, n_boot=20).evidence.frame; assert (one_class.loc[one_class["value"].isna(), "limitation"] != "").all()
    part = p.frame.copy(); part.loc[part["variant"].eq("noisy") & part["subject_id"].lt(20), ["y_prob", "status"]] = [np.nan, "error"]; some = simulate_capacity(Predictions(part), 1, .3, n_boot=20).evidence
    assert "20 of 60 rows" in of(some, "noisy")["limitation"].iloc[0] and of(some, "true risk")["n"].iloc[0] == 60 and len(of(some, "treat all").loc[["achieved_net_benefit"]]) == 1

@pytest.mark.parametrize("wrong", [dict(capacity=-1), dict(capacity=1.5), dict(capacity=(1, 2)), dict(order="random"), dict(effect=2), dict(fade=-1), dict(wait_days=.5), dict(round_hour=0), dict(threshold=1), dict(arrivals_per_day=0.0, days=0) | dict(arrivals_per_day=-2)])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ParameterError): simulate_capacity(simulate(20), **(dict(capacity=1, threshold=.3, n_boot=20) | wrong))

def test_sizes_of_teams_by_hand():
    "Benefit a day 0, .5, .8, .9 of .9 without a limit; a day costs .3, a place .15: left -.3, .05, .2, .15"
    rows = [dict(run=r, variant="m", order="first come", capacity=float(k), per_day=b, free_per_day=.9) for r in range(30) for k, b in enumerate((0, .5, .8, .9))]
    found = break_even_capacity(pd.DataFrame(rows), .3, .15).frame.set_index("metric"); assert found["value"].to_dict() == dict(break_even_capacity=1, sufficient_capacity=3, best_capacity=2) and (found["low"] == found["value"]).all()
    dear = break_even_capacity(pd.DataFrame(rows), 2).frame.set_index("metric"); assert np.isnan(dear.loc["break_even_capacity", "value"]) and "no capacity tried pays" in dear.loc["best_capacity", "limitation"] and dear.loc["sufficient_capacity", "value"] == 3

def test_sizes_of_random_periods_come_from_their_mean():
    "One odd period in 40, the first, in which nothing pays: the mean benefit a day is .8 * 39 / 40 at one place, so one place pays for .3"
    rows = [dict(run=r, random=True, variant="m", order="first come", capacity=float(k), per_day=0 if r == 0 else b, free_per_day=.9) for r in range(40) for k, b in enumerate((0, .8))]
    e = break_even_capacity(pd.DataFrame(rows), .3).frame.set_index("metric").loc["break_even_capacity"]; assert e["value"] == e["low"] == e["high"] == 1

def test_figures_say_what_the_numbers_say():
    import matplotlib; matplotlib.use("Agg"); import matplotlib.pyplot as plt
    p = arrive(simulate(80), 60); found, _ = capacity_curve(p, [0, 1, 2], .3, n_boot=20); said = lambda ax: (ax.get_title(loc="left") or ax.get_title()).replace("\n", " ").replace("\xa0", " ")
    assert said(capacity_plot(found, "noisy")) == message_capacity(found, "noisy") and "With 1 seen a day" in message_capacity(found, "noisy") and "n=80" in message_capacity(found)
    rounds = simulate_capacity(p, 1, .3, n_boot=20).rounds; assert said(queue_plot(rounds)) == message_queue(rounds) and str(rounds.query("variant == 'true risk'")["seen"].sum()) in message_queue(rounds)
    weekly, _ = capacity_curve(p, [(1,) * 7, (2,) * 7], .3, n_boot=20); assert "7 seen a week" in said(capacity_plot(weekly)); plt.close("all")
    with pytest.raises(TableError, match="Did you mean 'noisy'"): message_capacity(found, "noise")

def test_the_round_of_an_alert():
    assert first_round([0, 1439, 1440, 2879], 24).tolist() == [0, 0, 1, 1] and first_round([479, 480, 481], 8).tolist() == [0, 1, 1]
