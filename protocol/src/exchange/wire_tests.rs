//! Frozen bytes, limits at their edges, canonical encodings.

use proptest::prelude::*;

use super::*;

fn hash(byte: u8) -> ContentHash {
    ContentHash::from_bytes([byte; 32])
}

fn read_request(bytes: &[u8]) -> Result<ToProvider, MalformedExchange> {
    let (head, body) = bytes.split_first_chunk().ok_or(MalformedExchange("head"))?;
    ToProvider::from_body(MessageHead::of_request(head)?, body)
}

fn read_answer(bytes: &[u8]) -> Result<FromProvider<Vec<u8>>, MalformedExchange> {
    let (head, body) = bytes.split_first_chunk().ok_or(MalformedExchange("head"))?;
    FromProvider::from_body(MessageHead::of_answer(head)?, body.to_vec())
}

#[test]
fn requests_are_frozen() {
    let repeated = |byte: u8| vec![byte; 32];
    let frozen = [
        (ToProvider::Follow { id: 1, model: ModelId(hash(0xaa)) }, [vec![1, 1, 0, 0, 0, 32, 0, 0, 0], repeated(0xaa)].concat()),
        (ToProvider::Hashes { id: 0x0102, blob: hash(0xbb) }, [vec![2, 2, 1, 0, 0, 32, 0, 0, 0], repeated(0xbb)].concat()),
        (
            ToProvider::Group { id: 3, urgency: Urgency::Rest, blob: hash(0xcc), group: 0x0506 },
            [vec![3, 3, 0, 0, 0, 37, 0, 0, 0, 2], repeated(0xcc), vec![6, 5, 0, 0]].concat(),
        ),
        (ToProvider::Cancel { id: 4 }, vec![4, 4, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (message, bytes) in frozen {
        assert_eq!(message.to_bytes(), bytes, "{message:?}");
        assert_eq!(read_request(&bytes), Ok(message));
    }
}

#[test]
fn answers_are_frozen() {
    let mut bits = Bitfield::new(3);
    bits.set(1, true);
    let frozen = [
        (FromProvider::Hello { requests_max: 1024 }, vec![16, 0, 0, 0, 0, 4, 0, 0, 0, 0, 4, 0, 0]),
        (FromProvider::Have { id: 1, bits }, vec![17, 1, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, 2]),
        (FromProvider::Update { id: 1, changes: vec![(7, true), (8, false)] }, vec![18, 1, 0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0x80, 8, 0, 0, 0]),
        (FromProvider::Hashes { id: 2, hashes: vec![[9; 32]] }, [vec![19, 2, 0, 0, 0, 32, 0, 0, 0], vec![9; 32]].concat()),
        (FromProvider::Group { id: 3, bytes: vec![1, 2, 3] }, vec![20, 3, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3]),
        (FromProvider::NotHave { id: 4 }, vec![21, 4, 0, 0, 0, 0, 0, 0, 0]),
        (FromProvider::Busy { id: 5, retry_ms: 258 }, vec![22, 5, 0, 0, 0, 4, 0, 0, 0, 2, 1, 0, 0]),
        (FromProvider::Wait { id: 6 }, vec![23, 6, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (message, bytes) in frozen {
        assert_eq!(message.to_bytes(), bytes, "{message:?}");
        assert_eq!(read_answer(&bytes), Ok(message));
    }
}

#[test]
fn every_length_is_limited_by_its_kind() {
    for byte in 0..=u8::MAX {
        let Ok(kind) = MessageKind::try_from(byte) else { continue };
        for (length, fine) in [(kind.bytes_max(), true), (kind.bytes_max() + 1, false), (1 << 30, false)] {
            let head = MessageHead { kind, id: 1, length }.to_bytes();
            let accepted = MessageHead::of_request(&head).is_ok() || MessageHead::of_answer(&head).is_ok();
            assert_eq!(accepted, fine, "{kind:?} of {length} bytes");
        }
    }
}

#[test]
fn nobody_speaks_the_other_s_part() {
    assert!(read_answer(&ToProvider::Cancel { id: 1 }.to_bytes()).is_err());
    assert!(read_request(&FromProvider::<Vec<u8>>::Wait { id: 1 }.to_bytes()).is_err());
    assert!(read_request(&ToProvider::Cancel { id: 0 }.to_bytes()).is_err(), "zero names nothing");
}

proptest! {
    #[test]
    fn whatever_is_accepted_encodes_to_the_same_bytes(kind in 0u8..32, id in 0u32..3, body in proptest::collection::vec(any::<u8>(), 0..70)) {
        let mut bytes = vec![kind];
        bytes.extend(id.to_le_bytes());
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(&body);
        if let Ok(message) = read_request(&bytes) { prop_assert_eq!(message.to_bytes(), bytes.clone()); }
        if let Ok(message) = read_answer(&bytes) { prop_assert_eq!(message.to_bytes(), bytes); }
    }
}
