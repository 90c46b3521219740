//! Records against vectors that `tests/vectors/scripts/records.py` made, and what a book keeps.

use super::book::{Known, PER_NODE_MAX, RecordBook, is_newer};
use super::*;
use crate::hash::{BlobRef, ContentHash, ModelId, from_hex};
use crate::manifest::ExpertSlot;
use crate::profile::ProfileBody;
use serde_json::Value;

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| from_hex::<1>(&text[2 * i..2 * i + 2]).expect("vectors are hexadecimal")[0]).collect()
}

fn hash(v: &Value) -> ContentHash {
    v.as_str().expect("a text").parse().expect("a hash")
}

/// The name of the check that refuses.
fn check(refused: Refused) -> &'static str {
    match refused {
        Refused::Length => "length",
        Refused::Rate | Refused::Full => "rate",
        Refused::Envelope(EnvelopeError::Signature) => "signature",
        Refused::Envelope(_) => "envelope",
        Refused::Decode => "decode",
        Refused::NotCanonical => "canonical",
        Refused::Signer => "signer",
        Refused::Version(_) => "version",
        Refused::Times { .. } => "times",
        Refused::Seq => "seq",
        Refused::Equivocation(_) => "equivocation",
        Refused::Unknown => "unknown",
    }
}

fn open<R: Record>(v: &Value, is_known: impl Fn(&R) -> bool) -> Result<Verified<R>, Refused> {
    let bytes = unhex(v["bytes"].as_str().expect("a text"));
    let opened = Verified::<R>::open(v["now_ms"].as_u64().expect("a time"), bytes)?;
    let known = &v["known"]["seq"];
    if let Some(seq) = known.as_u64().or_else(|| known.as_str()?.parse().ok()) {
        let same = ContentHash::of(opened.as_bytes()) == hash(&v["known"]["bytes_hash"]);
        is_newer(opened.node(), seq, opened.record().head().seq, same)?;
    }
    if is_known(opened.record()) { Ok(opened) } else { Err(Refused::Unknown) }
}

fn head(v: &Value) -> Result<Verified<ProfileHead>, Refused> {
    let has = |list: &str, hash: ContentHash| {
        v["known"][list].as_array().is_some_and(|known| known.iter().any(|known| known.as_str() == Some(&hash.to_hex())))
    };
    open::<ProfileHead>(v, |head| has("models", head.model.0) && has("probes", head.probes))
}

fn body(v: &Value) -> Result<(), &'static str> {
    let mut of_head = v.clone();
    of_head["bytes"] = v["head"].clone();
    let head = head(&of_head).map_err(check)?;
    let (bytes, shape) = (unhex(v["bytes"].as_str().expect("a text")), &v["shape"]);
    let number = |name: &str| shape[name].as_u64().expect("a number") as u32;
    let slots: Vec<_> =
        (0..number("layers")).flat_map(|layer| (0..number("experts")).map(move |expert| ExpertSlot::text(layer, expert))).collect();
    if BlobRef::of(&bytes) != head.record().body {
        return Err("body");
    }
    let about = (head.record().model, head.record().probes);
    ProfileBody::from_bytes(&bytes, about, &slots).map_err(|_| "body").map(|body| assert_eq!(body.to_bytes(), bytes))
}

#[test]
fn agrees_with_the_vectors() {
    let text = include_str!("../../../tests/vectors/records.json");
    let vectors: Vec<Value> = serde_json::from_str(text).expect("vectors are JSON");
    let mut counts = std::collections::BTreeMap::<String, u32>::new();
    for v in &vectors {
        let result = match v["record"].as_str().expect("a text") {
            "profile" => head(v).map(drop).map_err(check),
            "attestation" => open::<Attestation>(v, |_| true).map(drop).map_err(check),
            "node" => open::<NodeRecord>(v, |_| true).map(drop).map_err(check),
            "body" => body(v),
            other => panic!("{other}"),
        };
        let expected = v["expected"].as_str().expect("a text");
        assert_eq!(result.err().unwrap_or("ok"), expected, "{}", v["name"]);
        *counts.entry(expected.to_owned()).or_default() += 1;
    }
    assert!(counts["ok"] >= 10 && counts.len() == 13, "{counts:?}");
}

fn head_of(key: &NodeKey, model: &[u8], seq: u64) -> Verified<ProfileHead> {
    let body = BlobRef::of(model);
    let head = RecordHead { seq, ..RecordHead::new(key.id(), 1_000_000, ProfileHead::LIFE_MS_MAX, None) };
    let (model, probes) = (ModelId(ContentHash::of(model)), ContentHash::of(b"probes"));
    Verified::seal(key, ProfileHead { head, model, probes, build_profile: probes, body, summary: Vec::new() })
}

const ALL: Known<'_> = Known { models: &|_| true, probes: &|_| true };

#[test]
fn refuses_what_is_older_and_remembers_who_says_two_things() {
    let key = NodeKey::from_secret(&[1; 32]);
    let mut book = RecordBook::default();
    let alike = |_: &NodeId| 0.0;
    assert_eq!(book.take_head(head_of(&key, b"m", 5), &ALL, &alike), Ok(()));
    assert_eq!(book.take_head(head_of(&key, b"m", 4), &ALL, &alike), Err(Refused::Seq));
    assert_eq!(book.take_head(head_of(&key, b"m", 5), &ALL, &alike), Err(Refused::Seq));
    let mut other = head_of(&key, b"m", 5).record().clone();
    other.build_profile = ContentHash::of(b"other");
    assert_eq!(book.take_head(Verified::seal(&key, other), &ALL, &alike), Err(Refused::Equivocation(key.id())));
    // Taken back: nothing counts, and nothing older returns, even when its time would be over.
    let mut revoked = head_of(&key, b"m", SEQ_REVOKED).record().clone();
    revoked.head.expires_ms = revoked.head.issued_ms;
    assert_eq!(book.take_head(Verified::seal(&key, revoked), &ALL, &alike), Ok(()));
    assert_eq!(book.heads(1_000_000).count(), 0);
    book.expire(1_000_000 + ProfileHead::LIFE_MS_MAX);
    assert_eq!(book.take_head(head_of(&key, b"m", 6), &ALL, &alike), Err(Refused::Seq));
    book.expire(1_000_001 + ProfileHead::LIFE_MS_MAX + SKEW_MS);
    assert_eq!(book.bytes_of(&key.id()).count(), 0);
}

#[test]
fn heads_of_unknown_models_wait() {
    let (key, mut book) = (NodeKey::from_secret(&[1; 32]), RecordBook::default());
    let nobody = Known { models: &|_| false, probes: &|_| true };
    for seq in [3, 5, 4] {
        assert_eq!(book.take_head(head_of(&key, b"m", seq), &nobody, &|_| 0.0), Err(Refused::Unknown));
    }
    assert!(book.unpark(&nobody).is_empty());
    let ready = book.unpark(&ALL);
    assert_eq!(ready.iter().map(|head| head.record().head.seq).collect::<Vec<_>>(), [5]);
}

#[test]
fn one_node_has_room_for_so_many_and_crowds_do_not_push_out_who_is_known() {
    let (key, mut book) = (NodeKey::from_secret(&[1; 32]), RecordBook::default());
    let priority = |node: &NodeId| if *node == key.id() { 0.9 } else { 0.027 };
    for model in 0..=PER_NODE_MAX {
        let taken = book.take_head(head_of(&key, &model.to_le_bytes(), 1), &ALL, &priority);
        assert_eq!(taken, if model < PER_NODE_MAX { Ok(()) } else { Err(Refused::Full) });
    }
}

#[test]
fn a_node_that_has_lost_all_but_its_key_is_ahead_of_what_it_said() {
    let id = NodeKey::from_secret(&[1; 32]).id();
    let before = RecordHead::new(id, 5000, 10, Some(4000));
    assert_eq!((before.seq, before.expires_ms), (5000, 5010));
    assert_eq!(RecordHead::new(id, 5000, 10, Some(5000)).seq, 5001);
    assert_eq!(RecordHead::new(id, 10, 10, Some(5001)).seq, 5002, "a clock that went back");
    assert!(RecordHead::new(id, 6000, 10, None).seq > 5002);
    assert!(RecordHead::new(id, 6000, 10, Some(SEQ_REVOKED)).seq < SEQ_REVOKED);
}
