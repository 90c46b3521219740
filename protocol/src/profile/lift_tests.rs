//! Bounds against scipy's, of worlds that `tests/vectors/scripts/trust.py` made.

use super::*;
use crate::hash::{ContentHash, ModelId};
use crate::profile::Modality;
use serde_json::Value;

fn number(v: &Value, name: &str) -> u64 {
    v[name].as_u64().expect("a number")
}

fn body(world: &Value) -> ProfileBody {
    let domains = world["domains"].as_array().expect("a list").iter().enumerate().map(|(i, v)| DomainTotal {
        name: format!("d{i:02}"),
        modality: Modality::Text,
        probes: number(v, "probes") as u32,
        tokens: number(v, "tokens"),
        square_tokens: number(v, "square_tokens"),
    });
    let experts = world["experts"].as_array().expect("a list");
    let hash = ContentHash::of(b"");
    let mut body = ProfileBody::new(ModelId(hash), hash, domains.collect(), experts.len());
    for (counts, expert) in body.experts.iter_mut().zip(experts) {
        for (counts, v) in counts.domains.iter_mut().zip(expert.as_array().expect("a list")) {
            counts.routed = number(v, "routed") as u32;
            counts.square_routed = number(v, "square_routed") as u32;
            counts.cross = number(v, "cross") as u32;
        }
    }
    body
}

#[test]
fn lifts_bounds_and_discoveries_are_those_of_scipy() {
    let vectors: Value = serde_json::from_str(include_str!("../../../tests/vectors/lift.json")).expect("JSON");
    let mut compared = 0;
    for world in vectors["worlds"].as_array().expect("a list") {
        let body = body(world);
        for (domain, expected) in world["expected"].as_array().expect("a list").iter().enumerate() {
            let ranked = ranking(&body, domain);
            let expected = expected.as_array().expect("a list");
            assert_eq!(ranked.len(), expected.len());
            assert!(ranked.is_sorted_by(|a, b| a.lift.lower >= b.lift.lower));
            for v in expected {
                let one = ranked.iter().find(|one| one.expert as u64 == number(v, "expert")).expect("it is ranked");
                let Lift { value, lower, upper, p_value } = one.lift;
                for (ours, name) in [(value, "lift"), (lower, "lower"), (upper, "upper"), (p_value, "p"), (one.q_value, "q")] {
                    let theirs = v[name].as_f64().expect("a number");
                    assert!((ours - theirs).abs() <= 1e-6 * theirs.abs() + 1e-12, "{name} of {v}: {ours}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 500, "{compared}");
    for v in vectors["wilson"].as_array().expect("a list") {
        let (hits, trials) = (v[0].as_u64().expect("a number") as u32, v[1].as_u64().expect("a number") as u32);
        let (lower, upper) = wilson(hits, trials, Z_95);
        assert!((lower - v[2].as_f64().expect("a number")).abs() < 1e-9 && (upper - v[3].as_f64().expect("a number")).abs() < 1e-9, "{v}");
    }
}

#[test]
fn of_experts_that_are_alike_few_are_called_specialists() {
    // 2,000 experts that are used alike everywhere: at a rate of 5%, nearly none is called anything.
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1u32 << 31)
    };
    let total = |i| DomainTotal { name: format!("d{i}"), modality: Modality::Text, probes: 100, tokens: 8000, square_tokens: 640_000 };
    let hash = ContentHash::of(b"");
    let mut body = ProfileBody::new(ModelId(hash), hash, (0..5).map(total).collect(), 2000);
    for counts in &mut body.experts {
        for counts in &mut counts.domains {
            for _ in 0..100 {
                let routed = (0..80).filter(|_| random() < 0.06).count() as u32;
                counts.routed += routed;
                counts.square_routed += routed * routed;
                counts.cross += routed * 80;
            }
        }
    }
    let called: usize = (0..5).map(|domain| ranking(&body, domain).iter().filter(|one| one.is_specialist()).count()).sum();
    assert!(called <= 3, "{called} of 10,000");
}
