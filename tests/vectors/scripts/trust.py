"""Golden vectors of trust scores, and of lifts and their bounds.

usage: trust.py TRUST.json LIFT.json      (made with numpy 2.2.6, scipy 1.15.3)

Trust: evidence fades by exp2(-t / half-life), 7 days for good and 30 for bad, good is capped at 20 after each addition, and the score is
max(0, m - 1.64 s) of Beta(1 + good, 1 + bad), with mean and variance from scipy.

Lift: probes of random length and random counts. Variances come from the probes themselves: the sample variance of r_p - share * n_p, the
delta method on ln(share_d / mean of shares) by a numerical gradient, and normal quantiles and Benjamini-Hochberg from scipy. The vectors hold the sums that
a profile has.
"""
import json
import sys

import numpy as np
from scipy import stats

DAY = 86_400_000
PENALTY = {"good": 0.0, "timed_out": 0.5, "wrong_bytes": 2.0, "wrong_result": 10.0}


def score_after(steps, now):
    good, bad, at = 0.0, 0.0, 0
    for step in steps:
        passed = max(0, step["at_ms"] - at)
        good, bad, at = good * 2 ** (-passed / (7 * DAY)), bad * 2 ** (-passed / (30 * DAY)), max(at, step["at_ms"])
        if step["outcome"] == "good":
            good = min(20.0, good + 1)
        else:
            bad += PENALTY[step["outcome"]]
    passed = max(0, now - at)
    beta = stats.beta(1 + good * 2 ** (-passed / (7 * DAY)), 1 + bad * 2 ** (-passed / (30 * DAY)))
    return max(0.0, beta.mean() - 1.64 * beta.std())


def trust(rng):
    steps = lambda *pairs: [{"at_ms": int(at), "outcome": outcome} for at, outcome in pairs]
    cases = [(steps(), 5), (steps(*[(0, "good")] * 7), 0), (steps(*[(0, "good")] * 7), 7 * DAY), (steps(*[(0, "good")] * 200, (0, "wrong_result")), 0)]
    cases += [(steps((5 * DAY, "good"), (3 * DAY, "good")), 4 * DAY)]  # a clock that goes back
    for _ in range(20):
        times = np.sort(rng.integers(0, 90 * DAY, rng.integers(1, 40)))
        outcomes = rng.choice(list(PENALTY), len(times), p=[0.8, 0.1, 0.06, 0.04])
        cases.append((steps(*zip(times, map(str, outcomes))), int(times[-1] + rng.integers(0, 30 * DAY))))
    return [{"steps": s, "now_ms": int(now), "score": score_after(s, now)} for s, now in cases]


def lift_world(rng, domains, experts, exclusive=0):
    lengths = [rng.integers(5, 120, rng.integers(20, 60)) for _ in range(domains)]
    counts = np.zeros((experts, domains), dtype=object)
    for e in range(experts):
        for d in range(domains):
            base = 0.02 if rng.random() < 0.7 else 0.3
            shares = np.clip(rng.normal(base, base, len(lengths[d])), 0, 1)
            counts[e, d] = rng.binomial(lengths[d], shares) * (e >= exclusive or d == e % domains)
    totals = [{"probes": len(n), "tokens": int(n.sum()), "square_tokens": int((n**2).sum())} for n in lengths]
    out = {"domains": totals, "experts": []}
    for e in range(experts):
        out["experts"].append(
            [
                {"routed": int(r.sum()), "square_routed": int((r**2).sum()), "cross": int((r * n).sum())}
                for r, n in zip(counts[e], lengths)
            ]
        )

    def log_lift(shares, d):
        return np.log(shares[d] / np.mean(shares))

    expected = []
    for d in range(domains):
        rows = []
        for e in range(experts):
            if counts[e, d].sum() < 20:
                continue
            shares = np.array([r.sum() / n.sum() for r, n in zip(counts[e], lengths)])
            variances = []
            for share, r, n in zip(shares, counts[e], lengths):
                residual = r - share * n  # sums to 0, so its sample variance is about the mean
                clustered = len(n) * residual.var(ddof=1) / n.sum() ** 2
                variances.append(max(clustered, share * (1 - share) / n.sum(), 1 / n.sum() ** 2))  # where none was seen, the next may be
            step = 1e-7
            gradient = np.array([(log_lift(shares + step * u, d) - log_lift(shares - step * u, d)) / (2 * step) for u in np.eye(domains)])
            deviation = np.sqrt((gradient**2 * variances).sum())
            z, q = log_lift(shares, d), stats.norm.ppf(0.95)
            rows.append([e, np.exp(z), np.exp(z - q * deviation), np.exp(z + q * deviation), stats.norm.sf(z / deviation)])
        q_values = stats.false_discovery_control([row[4] for row in rows], method="bh") if rows else []
        expected.append([{"expert": r[0], "lift": r[1], "lower": r[2], "upper": r[3], "p": r[4], "q": float(q)} for r, q in zip(rows, q_values)])
    out["expected"] = expected
    return out


def main():
    rng = np.random.default_rng(11)
    with open(sys.argv[1], "w") as f:
        json.dump(trust(rng), f, indent=0)
    worlds = [lift_world(rng, 3, 12), lift_world(rng, 9, 24)]
    worlds.append(lift_world(rng, 2, 8, exclusive=4))
    wilson = [[int(h), int(n), *map(float, stats.binomtest(int(h), int(n)).proportion_ci(0.90, "wilson"))] for n in (1, 7, 50, 1000) for h in {0, n // 3, n}]
    with open(sys.argv[2], "w") as f:
        json.dump({"worlds": worlds, "wilson": sorted(wilson)}, f)


main()
