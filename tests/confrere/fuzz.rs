//! P1 and P2 at the scale of CI: parsers of outside bytes, fed with damaged good input. `CONFRERE_FUZZ=1000000` runs longer.

use inference::chat::{ChatTemplate, Message, Rendering, Role};
use inference::checkpoint::families::{Preprocessors, parse_config};
use inference::checkpoint::generation::parse_generation;
use inference::checkpoint::header::read_header;
use inference::media::limits::MediaLimits;
use inference::media::patches::of_picture;
use inference::media::picture::{decode_frames, decode_picture, sample};
use inference::media::sound::decode_sound;
use inference::media::spectrum::spectrum;
use inference::tokenizer::Tokenizer;
use protocol::exchange::wire::{CHANGES_MAX, HEAD_BYTES, MessageHead};
use protocol::exchange::{Bitfield, FromProvider, ToProvider, Urgency};
use protocol::execute::{self, ExecuteAnswer, ExecuteRequest, Receipt, ReceiptResult, RequestHead, Task, row_bytes};
use protocol::expert_blob::ExpertShape;
use protocol::message::{FetchAnswer, Listing, Request, Subject};
use protocol::profile::{DomainTotal, Modality, ProfileBody};
use protocol::query::{Query, QueryAnswer};
use protocol::status::{Holding, Status};
use protocol::ticket::Ticket;
use protocol::{ContentHash, Domain, ModelId, ModelManifest, NodeKey, SignedEnvelope};

use crate::support::{Imported, checkpoint, shipped_model, vectors};

/// Inputs for each parser, unless the environment says more.
fn inputs(default: u64) -> u64 {
    std::env::var("CONFRERE_FUZZ").ok().and_then(|count| count.parse().ok()).unwrap_or(default)
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// Damages `seed` in one to four ways.
    fn damage(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(7) {
                _ if bytes.is_empty() => bytes.push(self.next() as u8),
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'9'][self.below(8)],
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.next() as u8),
                4 => drop(bytes.remove(at)),
                5 => {
                    let value = [u64::MAX, 1 << 63, 1 << 32, 0][self.below(4)].to_le_bytes();
                    bytes[at..].iter_mut().zip(value).for_each(|(byte, new)| *byte = new);
                }
                _ => {
                    let piece = bytes[at..(at + 1 + self.below(20)).min(bytes.len())].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
            }
        }
        bytes
    }
}

/// Feeds `parse` with damaged `seed`; a panic fails the test with the input's number.
fn feed(name: &str, seed: &[u8], count: u64, mut parse: impl FnMut(&[u8])) {
    let mut random = Random(seed.len() as u64);
    for i in 0..count {
        let input = random.damage(seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| parse(&input)));
        assert!(outcome.is_ok(), "{name}: input {i} panics: {:?}", String::from_utf8_lossy(&input));
    }
}

#[test]
fn no_parser_of_binary_input_panics() {
    let manifest = Imported::of("variant-dense").manifest;
    let envelope = manifest.seal(&NodeKey::from_secret(&[1; 32]));
    feed("manifest", &manifest.to_bytes(), inputs(20_000), |bytes| {
        if let Ok(read) = ModelManifest::from_bytes(bytes) {
            assert_eq!(read.to_bytes(), bytes, "canonical");
        }
    });
    let vector: serde_json::Value =
        serde_json::from_slice(&std::fs::read(crate::support::vectors("manifest.json")).expect("readable")).expect("JSON");
    let hex = vector["version_3"]["bytes"].as_str().expect("a text");
    let parts: Vec<u8> = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex")).collect();
    feed("manifest of parts", &parts, inputs(20_000), |bytes| {
        if let Ok(read) = ModelManifest::from_bytes(bytes) {
            assert_eq!(read.to_bytes(), bytes, "canonical");
        }
    });
    feed("envelope", envelope.as_bytes(), inputs(20_000), |bytes| drop(SignedEnvelope::open(Domain::Manifest, bytes.to_vec())));
    let listing = Listing { models: vec![("one".into(), manifest.id()), ("two".into(), manifest.id())] };
    let holding = Holding { name: "one".into(), model: manifest.id(), experts: 3, of: 4 };
    let status = Status {
        version: "0.1.0".into(),
        threads: 2,
        memory_bytes: 1,
        stored_bytes: 2,
        room_bytes: 3,
        executes: true,
        holdings: vec![holding],
    };
    feed("status", &status.to_bytes(), inputs(50_000), |bytes| drop(Status::from_bytes(bytes)));
    feed("listing", &protocol::codec::to_bytes(&listing), inputs(50_000), |bytes| drop(Listing::from_bytes(bytes)));
    let request = Request { subject: Subject::Manifest(ModelId(ContentHash::of(b"x"))), offset: 5, length: 100 };
    feed("request", &request.to_bytes(), inputs(100_000), |bytes| {
        let _ = bytes.first_chunk().map(Request::from_bytes);
    });
    feed("answer", &FetchAnswer::Bytes { total: 10, length: 5 }.to_bytes(), inputs(100_000), |bytes| {
        let _ = bytes.first_chunk().map(FetchAnswer::from_bytes);
    });
    let (id, blob) = (7, ContentHash::of(b"x"));
    let request = ToProvider::Group { id, urgency: Urgency::Soon, blob, group: 3 };
    feed("exchange request", &request.to_bytes(), inputs(100_000), |bytes| {
        let Some((head, body)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return };
        if let Ok(read) =
            MessageHead::of_request(head).and_then(|head| ToProvider::from_body(head, &body[..body.len().min(head.length as usize)]))
        {
            assert!(bytes.starts_with(&read.to_bytes()), "canonical");
        }
    });
    let answers: [FromProvider<Vec<u8>>; 4] = [
        FromProvider::Have { id, bits: Bitfield::new(100) },
        FromProvider::Update { id, changes: vec![(5, true); CHANGES_MAX] },
        FromProvider::Hashes { id, hashes: vec![[1; 32]; 3] },
        FromProvider::Group { id, bytes: vec![1; 100] },
    ];
    for answer in answers {
        feed("exchange answer", &answer.to_bytes(), inputs(25_000), |bytes| {
            let Some((head, body)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return };
            let body = |head: MessageHead| body[..body.len().min(head.length as usize)].to_vec();
            drop(MessageHead::of_answer(head).map(|head| FromProvider::from_body(head, body(head))));
        });
    }
    let shape = manifest.text().expert_shape(manifest.usual_precision());
    feed("expert", &[&shape.header()[..], &[0; 100]].concat(), inputs(100_000), |bytes| drop(ExpertShape::of_blob(bytes)));
}

/// What runs on execute and query streams, and bodies of profiles.
#[test]
fn no_parser_of_requests_panics() {
    let expert = ContentHash::of(b"x");
    let tasks = vec![Task { expert, rows: vec![0, 1] }, Task { expert, rows: vec![1] }];
    let request = ExecuteRequest { number: 1, nonce: [2; 16], hidden_size: 64, rows: vec![0; 2 * row_bytes(64)], tasks };
    feed("execute request", &request.to_bytes(), inputs(50_000), |bytes| {
        let Some((head, body)) = bytes.split_first_chunk() else { return };
        if let Ok(head) = RequestHead::from_bytes(head) {
            let body = &body[..body.len().min(head.body_bytes())];
            if head.is_hint() {
                drop(execute::hinted(body));
            } else {
                drop(ExecuteRequest::from_body(&head, body));
            }
        }
    });
    let answer = ExecuteAnswer::Results { task: 1, length: 256 };
    feed("execute answer", &answer.to_bytes(7), inputs(50_000), |bytes| {
        if let Some(head) = bytes.first_chunk() {
            let _ = ExecuteAnswer::from_bytes(head);
        }
    });
    let key = NodeKey::from_secret(&[1; 32]);
    let receipt = Receipt::seal(&key, [2; 16], vec![ReceiptResult { expert, input: expert, output: expert }]);
    feed("receipt", receipt.as_bytes(), inputs(10_000), |bytes| drop(Receipt::open(key.id(), [2; 16], bytes.to_vec())));
    let query = Query { model: ModelId(expert), domain: "code".into(), top: 5 };
    feed("query", &query.to_frame()[4..], inputs(50_000), |bytes| drop(Query::from_body(bytes)));
    let answer = QueryAnswer { domains: vec!["code".into()], experts: vec![3, 1], ..QueryAnswer::default() };
    feed("query answer", &answer.to_frame()[4..], inputs(50_000), |bytes| drop(QueryAnswer::from_body(bytes)));
    let domain = DomainTotal { name: "code".into(), modality: Modality::Text, probes: 1, tokens: 10, square_tokens: 100 };
    let slots: Vec<_> = (0..4).map(|expert| protocol::ExpertSlot::text(0, expert)).collect();
    let body = ProfileBody::new(ModelId(expert), expert, vec![domain], slots.len());
    feed("profile", &body.to_bytes(), inputs(50_000), |bytes| {
        drop(ProfileBody::from_bytes(bytes, (ModelId(expert), expert), &slots));
    });
}

#[test]
fn no_parser_of_text_input_panics() {
    let as_text = |bytes: &[u8], parse: &dyn Fn(&str)| parse(&String::from_utf8_lossy(bytes));
    let ticket = Ticket { node: NodeKey::from_secret(&[1; 32]).id(), addresses: vec!["/ip4/127.0.0.1/tcp/1".into()] };
    feed("ticket", ticket.to_string().as_bytes(), inputs(50_000), |bytes| as_text(bytes, &|text| drop(text.parse::<Ticket>())));
    feed("key", ticket.node.to_string().as_bytes(), inputs(50_000), |bytes| {
        as_text(bytes, &|text| {
            let _ = text.parse::<protocol::NodeId>();
        });
    });
    for family in ["tiny-qwen3-moe", "tiny-qwen3-omni", "tiny-mixtral", "tiny-olmoe", "tiny-qwen2-moe"] {
        let config = std::fs::read(checkpoint(family).join("config.json")).expect("a config");
        feed("config", &config, inputs(2_000), |bytes| {
            if let Ok(json) = serde_json::from_slice(bytes) {
                if let Ok(parsed) = parse_config(&json, &Preprocessors { pictures: json.clone(), videos: json.clone() }) {
                    assert!(parsed.parts.iter().all(|part| part.validate().is_ok() && !part.tensors().is_empty()));
                }
                parse_generation(&json, &json);
            }
        });
    }
    let template = b"{% for m in messages %}{{ m.role + ': ' + m.content.strip() }}{% endfor %}{% if add_generation_prompt %}x{% endif %}";
    feed("template", template, inputs(5_000), |bytes| {
        let template = ChatTemplate { source: String::from_utf8_lossy(bytes).into_owned(), bos_token: None, eos_token: None };
        let rendering = Rendering { add_generation_prompt: true, now_ms: 0, bytes_max: 1 << 20 };
        drop(template.render(&[Message::text(Role::User, "hello")], rendering));
    });
    let tokenizer = std::fs::read(shipped_model().join("tokenizer.json")).expect("a tokenizer");
    feed("tokenizer", &tokenizer, inputs(40).min(5_000), |bytes| drop(Tokenizer::from_bytes(bytes)));
}

/// P2: our reader of headers and the `safetensors` crate's accept the same files, but for names that stand twice.
#[test]
fn headers_are_accepted_just_when_the_crate_accepts_them() {
    let shard = std::fs::read(checkpoint("variant-tied").join("model-00001-of-00003.safetensors")).expect("a shard");
    let header = 8 + u64::from_le_bytes(shard[..8].try_into().expect("eight bytes")) as usize;
    let mut accepted = 0;
    feed("header", &shard[..header], inputs(100_000), |bytes| {
        let file = [bytes, &shard[header..]].concat();
        let (ours, theirs) = (read_header(&file), safetensors::SafeTensors::deserialize(&file));
        accepted += u64::from(ours.is_ok());
        match (&ours, &theirs) {
            (Ok(_), Err(error)) => panic!("accepted what the crate refuses: {error}"),
            (Err(problems), Ok(_)) => {
                let stricter = |what: &str| what.contains("stands twice") || what.contains("unknown field");
                assert!(problems.iter().any(|problem| stricter(&problem.what)), "refused what the crate accepts: {problems:?}");
            }
            _ => {}
        }
    });
    assert!(accepted > 100, "only {accepted} damaged headers were still valid");
}

/// Each road from a file's bytes to rows: decoding, sizes, patches, spectra.
#[test]
fn no_medium_makes_anything_panic_or_grow() {
    let limits = MediaLimits { bytes: 1 << 20, pixels: 1 << 16, frames: 16, seconds: 10.0, tokens: 1000 };
    let manifest = Imported::of("tiny-qwen3-omni-full").manifest;
    let (vision, audio) = (manifest.vision().expect("it sees"), manifest.audio().expect("it hears"));
    let media = |name: &str| std::fs::read(vectors("omni/media").join(name)).expect("the vectors have it");
    for name in ["c_64x64.png", "c.bmp", "c.gif", "c.jpg", "c.webp", "c_turned.jpg", "c_16bit.png"] {
        feed(name, &media(name), inputs(1_000), |bytes| {
            if let Ok(picture) = decode_picture(bytes, &limits) {
                assert!(picture.rgb.len() == 3 * picture.width * picture.height && picture.width * picture.height <= 1 << 16);
                drop(of_picture(vision, &picture));
            }
        });
    }
    for name in ["video.gif", "video.webp", "video.png"] {
        feed(name, &media(name), inputs(500), |bytes| {
            if let Ok(frames) = decode_frames(bytes, &limits).and_then(|frames| sample(&frames, 2.0, &limits)) {
                assert!(!frames.is_empty() && frames.len() <= limits.frames);
            }
        });
    }
    for name in ["short.wav", "short.flac", "short.mp3", "short.ogg"] {
        feed(name, &media(name), inputs(500), |bytes| {
            if let Ok(samples) = decode_sound(bytes, &limits) {
                assert!(samples.len() <= 16_000 * 10 + 1);
                assert!(spectrum(&samples, audio.bands as usize).iter().all(|x| x.is_finite()));
            }
        });
    }
}
