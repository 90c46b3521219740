//! The published Qwen3-Omni-30B-A3B: every one of its 28,010 tensors by name and shape, in files without a byte of weights.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use inference::checkpoint::{Checkpoint, CheckpointError};
use protocol::PartKind;
use serde_json::{Value, json};

use crate::support::{checkpoint, vectors};

const SHARDS: usize = 15;
const TENSORS: usize = 28_010;
const PARAMETERS: u64 = 35_259_818_545;

type Tensors = BTreeMap<String, Vec<u64>>;

/// Every published tensor with its shape. Numbers between dots have ranges; those at the end of a word count up.
fn published() -> Tensors {
    let file = fs::read(vectors("omni/names_published.json")).expect("the vectors have it");
    let list: Value = serde_json::from_slice(&file).expect("JSON");
    let mut tensors = Tensors::new();
    let mut repeated: BTreeMap<String, u64> = BTreeMap::new();
    for pattern in list["patterns"].as_array().expect("a list") {
        let name = pattern[0].as_str().expect("a name");
        let ordinal = repeated.entry(format!("{name}{}", pattern[1])).or_default();
        *ordinal += 1;
        let shape: Vec<u64> = pattern[2].as_array().expect("sides").iter().map(|side| side.as_u64().expect("a side")).collect();
        let ranges: Vec<[u64; 2]> = serde_json::from_value(pattern[1].clone()).expect("ranges");
        let words: Vec<_> = name.split('.').map(str::to_owned).collect();
        let mut names = vec![words];
        let mut ranges = ranges.into_iter();
        for at in 0..names[0].len() {
            let word = names[0][at].clone();
            if word == "{i}" {
                let [first, last] = ranges.next().expect("a range for each number between dots");
                let with = |words: &Vec<String>, number: u64| {
                    let mut words = words.clone();
                    words[at] = number.to_string();
                    words
                };
                names = names.iter().flat_map(|words| (first..=last).map(move |number| with(words, number))).collect();
            } else if word.contains("{i}") {
                names.iter_mut().for_each(|words| words[at] = word.replace("{i}", &ordinal.to_string()));
            }
        }
        tensors.extend(names.into_iter().map(|words| (words.join("."), shape.clone())));
    }
    tensors
}

/// The tiny model's configuration with the published numbers.
fn config() -> Value {
    let mut config: Value =
        serde_json::from_slice(&fs::read(checkpoint("tiny-qwen3-omni-full").join("config.json")).expect("it is there")).expect("JSON");
    let set = |object: &mut Value, values: Value| {
        for (name, value) in values.as_object().expect("an object") {
            object[name] = value.clone();
        }
    };
    let thinker = &mut config["thinker_config"];
    let vision =
        json!({"image_token_id": 151_655, "video_token_id": 151_656, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653});
    set(thinker, vision);
    set(thinker, json!({"audio_token_id": 151_675, "audio_start_token_id": 151_669, "audio_end_token_id": 151_670}));
    set(
        &mut thinker["text_config"],
        json!({"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
               "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 152_064,
               "rope_scaling": {"interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"}}),
    );
    set(
        &mut thinker["vision_config"],
        json!({"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "num_position_embeddings": 2304,
               "out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24]}),
    );
    set(
        &mut thinker["audio_config"],
        json!({"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "downsample_hidden_size": 480,
               "output_dim": 2048}),
    );
    let talker = &mut config["talker_config"];
    set(
        talker,
        json!({"accept_hidden_layer": 24, "thinker_hidden_size": 2048, "speaker_id": {"chelsie": 2301, "ethan": 2302, "aiden": 2303},
               "codec_pad_id": 2148, "codec_bos_id": 2149, "codec_eos_token_id": 2150, "codec_nothink_id": 2155, "codec_think_bos_id": 2156,
               "codec_think_eos_id": 2157}),
    );
    set(
        &mut talker["text_config"],
        json!({"hidden_size": 1024, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
               "num_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 384, "shared_expert_intermediate_size": 768,
               "intermediate_size": 2048, "vocab_size": 3072,
               "rope_scaling": {"interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"}}),
    );
    set(
        &mut talker["code_predictor_config"],
        json!({"hidden_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
               "intermediate_size": 3072, "vocab_size": 2048, "layer_types": ["full_attention"]}),
    );
    set(
        &mut config["code2wav_config"],
        json!({"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 3072,
               "sliding_window": 72, "codebook_size": 2048, "decoder_dim": 1536}),
    );
    config
}

/// Writes shards with headers alone, and an index.
fn write(dir: &Path, tensors: &[(String, Vec<u64>)], config: &Value) {
    fs::write(dir.join("config.json"), config.to_string()).expect("written");
    let mut map = BTreeMap::new();
    for (number, tensors) in tensors.chunks(tensors.len().div_ceil(SHARDS)).enumerate() {
        let file = format!("model-{:05}-of-{SHARDS:05}.safetensors", number + 1);
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let bytes = 2 * shape.iter().product::<u64>();
            header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes]}));
            end += bytes;
            map.insert(name.clone(), file.clone());
        }
        let header = Value::Object(header).to_string();
        let mut shard = File::create(dir.join(&file)).expect("created");
        shard.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| shard.write_all(header.as_bytes())).expect("written");
        shard.set_len(8 + header.len() as u64 + end).expect("sparse");
    }
    fs::write(dir.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).expect("written");
}

/// What is wrong with a checkpoint, in words; nothing when it opens.
fn problems(tensors: &[(String, Vec<u64>)], config: &Value) -> Option<String> {
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), tensors, config);
    match Checkpoint::open(dir.path()) {
        Ok(_) => None,
        Err(CheckpointError::Refused(problems)) => Some(problems.to_string()),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_published_tensors_are_accepted_and_none_may_be_amiss() {
    let tensors = published();
    assert_eq!(tensors.len(), TENSORS);
    assert_eq!(tensors.values().map(|shape| shape.iter().product::<u64>()).sum::<u64>(), PARAMETERS);
    let (all, config): (Vec<_>, _) = (tensors.clone().into_iter().collect(), config());
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), &all, &config);
    let opened = Checkpoint::open(dir.path()).unwrap_or_else(|error| panic!("{error}"));
    let parts: Vec<_> = opened.parts.iter().map(|part| (part.config.kind(), part.trunk.len(), 3 * part.experts.len())).collect();
    println!("{parts:?}");
    let expected = [
        (PartKind::Text, 435, 18_432),
        (PartKind::Vision, 351, 0),
        (PartKind::Audio, 525, 0),
        (PartKind::Talker, 271, 7680),
        (PartKind::CodePredictor, 86, 0),
        (PartKind::CodeToWave, 230, 0),
    ];
    assert_eq!(parts, expected);
    assert!(opened.skipped.is_empty() && opened.total_bytes() == 2 * PARAMETERS);
    // One of each kind of name, as the numbers in it do not matter.
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for (at, (name, _)) in all.iter().enumerate() {
        kinds.entry(name.chars().filter(|c| !c.is_ascii_digit()).collect()).or_insert(at);
    }
    println!("{} kinds of names", kinds.len());
    for (number, &at) in kinds.values().enumerate().step_by(5) {
        let (name, shape) = &all[at];
        let mut faulty = all.clone();
        let what = match number / 5 % 3 {
            0 => {
                faulty.remove(at);
                "missing"
            }
            1 => {
                let mut other = shape.clone();
                *other.last_mut().expect("a side") += 1;
                faulty[at].1 = other;
                "has shape"
            }
            _ => {
                // A second time, in another shard; the index can name one place alone.
                let place = if at > all.len() / 2 { 0 } else { faulty.len() };
                faulty.insert(place, (name.clone(), shape.clone()));
                name.as_str()
            }
        };
        let found = problems(&faulty, &config).unwrap_or_else(|| panic!("{name} is amiss, and nothing is said"));
        assert!(found.contains(name.as_str()) && found.contains(what), "{name}: {found}");
    }
}

/// Keys whose default in the library is not what was published.
#[test]
fn what_a_configuration_leaves_out_is_not_guessed() {
    let all: Vec<_> = published().into_iter().collect();
    let places: [(&[&str], &str); 7] = [
        (&["thinker_config"], "position_id_per_seconds"),
        (&["thinker_config"], "audio_token_id"),
        (&["thinker_config"], "audio_start_token_id"),
        (&["talker_config"], "num_code_groups"),
        (&["talker_config"], "accept_hidden_layer"),
        (&["talker_config"], "codec_eos_token_id"),
        (&["talker_config", "code_predictor_config"], "num_code_groups"),
    ];
    for (objects, key) in places {
        let mut config = config();
        let object = objects.iter().fold(&mut config, |value, name| &mut value[*name]);
        object.as_object_mut().expect("an object").remove(key);
        let found = problems(&all[..1], &config).expect("it is refused");
        assert!(found.contains(key), "{key}: {found}");
    }
}
