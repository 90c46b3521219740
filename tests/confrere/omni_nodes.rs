//! Pictures and sounds asked about with real processes: on the command line, over HTTP, and on nodes that hold nothing.

use std::path::PathBuf;

use base64::Engine as _;
use serde_json::{Value, json};

use crate::api::Door;
use crate::binary::{Node, text};
use crate::support::{checkpoint, floats, ids, read_safetensors, vectors};

const MODEL: &str = "tiny-qwen3-omni-full";
const LISTEN: [&str; 2] = ["--listen", "/ip4/127.0.0.1/tcp/0"];

fn media(name: &str) -> PathBuf {
    vectors("omni/media").join(name)
}

/// The whole model's checkpoint, whose videos are resized as the reference's were.
fn checkpoint_of_small_videos(dir: &std::path::Path) -> PathBuf {
    let path = dir.join("checkpoint");
    std::fs::create_dir(&path).expect("created");
    for entry in std::fs::read_dir(checkpoint(MODEL)).expect("it is there").flatten() {
        std::fs::copy(entry.path(), path.join(entry.file_name())).expect("copied");
    }
    let sizes =
        json!({"size": {"shortest_edge": 4096, "longest_edge": 12_288}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2});
    std::fs::write(path.join("video_preprocessor_config.json"), sizes.to_string()).expect("written");
    path
}

#[test]
fn eval_logits_of_messages_is_what_transformers_computes() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = Node::new();
    let imported = node.run(&["import", text(&checkpoint_of_small_videos(dir.path())), "--name", "m"]);
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    let clip = dir.path().join("clip");
    std::fs::create_dir(&clip).expect("created");
    for number in 0..5 {
        let name = format!("video_{number}.png");
        std::fs::copy(media(&name), clip.join(&name)).expect("copied");
    }
    let words = |words: &str| json!({"type": "text", "text": words});
    let file = |kind: &str, name: &str| json!({"type": kind, "path": media(name)});
    let video = |fps: f64, sound: Value| json!({"type": "video", "path": clip, "fps": fps, "sound": sound});
    let cases = [
        ("text", json!([words("What is one and two? 你好，世界。")])),
        ("image", json!([file("image", "a_75x53.png"), words("What is in the picture?")])),
        ("images2", json!([words("Left"), file("image", "a_75x53.png"), words(" right"), file("image", "b_131x208.png"), words(" same?")])),
        ("audio_short", json!([file("audio", "short.wav"), words("What do you hear?")])),
        ("audio_exact", json!([file("audio", "exact.wav"), words("What do you hear?")])),
        ("audio_long", json!([file("audio", "clip_long.wav"), words("Say it.")])),
        ("image_audio", json!([file("image", "c_64x64.png"), file("audio", "exact.wav"), words("What is it?")])),
        ("video", json!([video(1.0, Value::Null), words("Describe.")])),
        ("video_fps3", json!([video(3.0, json!(false)), words("Describe.")])),
        ("image_video", json!([file("image", "a_75x53.png"), video(1.0, Value::Null), words("Same?")])),
        ("video_audio", json!([video(3.0, json!(media("track.wav"))), words("Describe.")])),
    ];
    for (case, content) in cases {
        let (messages, out) = (dir.path().join("messages.json"), dir.path().join("out.safetensors"));
        let list = json!([{"role": "system", "content": "You are a helpful voice."}, {"role": "user", "content": content}]);
        std::fs::write(&messages, list.to_string()).expect("written");
        let ended = node.run(&["eval", "logits", "m", "--messages", text(&messages), "--out", text(&out)]);
        assert_eq!(ended.code, Some(0), "{case}: {}", ended.err);
        let (found, reference) = (read_safetensors(&out), read_safetensors(&vectors("omni/reference").join(format!("{case}.safetensors"))));
        assert_eq!(ids(&found["input_ids"]), ids(&reference["input_ids"]), "{case}");
        let (logits, expected) = (floats(&found["logits"]), floats(&reference["logits_last8"]));
        let worst = logits[logits.len() - expected.len()..].iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{case}: {worst:e}");
    }
}

/// What a run is asked, about which files.
fn question<'a>(model: &'a str, files: &'a [&'a str]) -> Vec<&'a str> {
    [&["run", model, "What is it?", "--max-tokens", "12", "--temperature", "0"], files].concat()
}

#[test]
fn nodes_with_nothing_answer_about_pictures_and_sounds_with_the_tokens_of_one_machine() {
    let (picture, sound) = (media("c_64x64.png"), media("exact.wav"));
    let files = ["--image", text(&picture), "--audio", text(&sound)];
    for precision in ["bf16", "q8", "q4"] {
        let a = Node::new();
        let imported = a.run(&["import", text(&checkpoint(MODEL)), "--name", "m", "--precision", precision]);
        assert_eq!(imported.code, Some(0), "{}", imported.err);
        let id = imported.out.lines().last().expect("the id").to_owned();
        let alone = a.json(&question("m", &files));
        let kinds: Vec<_> = alone["media"].as_array().expect("a list").iter().map(|medium| (&medium["kind"], &medium["tokens"])).collect();
        assert_eq!(kinds, [(&json!("image"), &json!(4)), (&json!("audio"), &json!(26))]);
        let uses = &alone["experts"]["by_modality"];
        assert_eq!((&uses["image"]["tokens"], &uses["audio"]["tokens"]), (&json!(4), &json!(26)), "{uses}");
        let used = ["text", "image", "audio"].map(|modality| uses[modality]["experts"].as_u64().expect("a count"));
        assert!(used.iter().all(|&used| used > 0 && Some(used) <= alone["experts"]["needed"].as_u64()), "{uses}");
        let of_text = a.json(&question("m", &[]));
        let serving = a.serve_with(&[&LISTEN[..], &["--execute-for", "any"]].concat());
        let bytes = |node: &Node| node.json(&["repo", "stat"])["bytes"].as_u64().expect("bytes");
        // Who asks about text has no tower; who asks about a picture gets one by hash, like everything.
        let b = Node::new();
        b.trust(&a);
        assert_eq!(b.json(&question(&id, &["--peer", &serving.address]))["tokens"], of_text["tokens"], "{precision}");
        let without = bytes(&b);
        let about: Vec<_> = [&files[..], &["--peer", &serving.address]].concat();
        assert_eq!(b.json(&question(&id, &about))["tokens"], alone["tokens"], "{precision}");
        let towers = bytes(&b) - without;
        println!("{precision}: {without} bytes for text, {towers} more for towers and other experts");
        let parts = a.json(&["show", "m"])["parts"].clone();
        let of_towers = parts.as_array().expect("a list").iter().filter(|part| part["kind"] == "vision" || part["kind"] == "audio");
        let least: u64 = of_towers.map(|part| part["trunk_bytes"].as_u64().expect("bytes")).sum();
        assert!(least > 0 && towers >= least, "towers have come: {towers} of {least} bytes");
        // And who has experts run elsewhere.
        let c = Node::new();
        c.trust(&a);
        let elsewhere: Vec<_> = [&about[..], &["--execute-at", "any", "--audit", "1"]].concat();
        let answer = c.json(&question(&id, &elsewhere));
        assert_eq!(answer["tokens"], alone["tokens"], "{precision}");
        assert!(precision == "bf16" || answer["experts"]["remote"].as_u64() > Some(0), "{answer}");
    }
}

fn data_url(kind: &str, name: &str) -> String {
    let bytes = std::fs::read(media(name)).expect("the vectors have it");
    format!("data:{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

fn chat(content: &Value) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0, "return_token_ids": true})
}

fn tokens(answer: &Value) -> Value {
    answer["choices"][0]["token_ids"].clone()
}

#[test]
fn the_api_takes_pictures_and_sounds_and_keeps_what_it_made_of_them() {
    let node = Node::new();
    let imported = node.run(&["import", text(&checkpoint(MODEL)), "--name", "m", "--precision", "q8"]);
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    let (picture, sound) = (media("c_64x64.png"), media("exact.wav"));
    let alone = node.json(&question("m", &["--image", text(&picture), "--audio", text(&sound)]));
    let of_picture = node.json(&question("m", &["--image", text(&picture)]));
    let of_text = node.json(&question("m", &[]));
    let door = Door::of(node, imported.out.lines().last().expect("the id").to_owned(), &[]);
    let image = json!({"type": "image_url", "image_url": {"url": data_url("image/png", "c_64x64.png"), "detail": "auto"}});
    let bare = json!({"type": "image_url", "image_url": data_url("image/png", "c_64x64.png")});
    let heard = json!({"type": "input_audio", "input_audio": {"data": data_url("audio/wav", "exact.wav").split_once(',').expect("a URL").1, "format": "wav"}});
    let words = json!({"type": "text", "text": "What is it?"});
    for image in [&image, &bare] {
        let answer = door.answer("/v1/chat/completions", &chat(&json!([image, heard, words])));
        assert_eq!(tokens(&answer), alone["tokens"]);
        let uses = &answer["usage"]["x_experts"]["by_modality"];
        // What was there already is not routed again.
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"] != json!(0);
        assert!(cached || *uses == alone["experts"]["by_modality"], "{uses}");
    }
    // Requests with and without media share passes, and change nothing of each other.
    let bodies = [chat(&json!([image, heard, words])), chat(&json!([image, words])), chat(&json!("What is it?"))];
    let expected = [&alone, &of_picture, &of_text];
    std::thread::scope(|scope| {
        let askers: Vec<_> = (0..9)
            .map(|i| {
                (
                    i % 3,
                    scope.spawn({
                        let (door, body) = (&door, &bodies[i % 3]);
                        move || door.answer("/v1/chat/completions", body)
                    }),
                )
            })
            .collect();
        for (which, asker) in askers {
            assert_eq!(tokens(&asker.join().expect("no panic")), expected[which]["tokens"]);
        }
    });
    // A second question about the same picture takes in what is new alone.
    let first = chat(&json!([image, words]));
    let answer = door.answer("/v1/chat/completions", &first);
    let said = answer["choices"][0]["message"]["content"].clone();
    let mut second = first.clone();
    second["messages"] = json!([first["messages"][0], {"role": "assistant", "content": said}, {"role": "user", "content": "And now?"}]);
    let answer = door.answer("/v1/chat/completions", &second);
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
    assert!(cached >= 20, "{}", answer["usage"]);
    // Another picture in the same place is another prompt.
    let mut other = second.clone();
    other["messages"][0]["content"][0]["image_url"]["url"] = json!(data_url("image/png", "a_75x53.png"));
    let answer = door.answer("/v1/chat/completions", &other);
    assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count") < 20, "{}", answer["usage"]);
    refuses_what_is_no_picture(&door, &words);
}

/// Each ends with an error that names the part and the rule, and the node serves on.
fn refuses_what_is_no_picture(door: &Door, words: &Value) {
    let url = |kind: &str, bytes: &[u8]| format!("data:{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes));
    let image = |url: String| json!({"type": "image_url", "image_url": {"url": url}});
    let wav = std::fs::read(media("short.wav")).expect("the vectors have it");
    let png = std::fs::read(media("c_64x64.png")).expect("the vectors have it");
    let mut lies = wav.clone();
    lies[40..44].copy_from_slice(&(1_u32 << 30).to_le_bytes());
    // A bitmap's head, and some of its pixels.
    let bitmap = |width: u32, height: u32| {
        let mut bytes = b"BM".to_vec();
        bytes.extend((54_u32 + 40_000).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(54_u32.to_le_bytes());
        for number in [40, width, height] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend([1, 0, 24, 0]);
        bytes.extend([0; 24]);
        bytes.extend(vec![0; 40_000]);
        bytes
    };
    let sound = |bytes: &[u8]| json!({"type": "input_audio", "input_audio": {"data": base64::engine::general_purpose::STANDARD.encode(bytes), "format": "wav"}});
    let cases = [
        ("an address", image("https://example.org/a.png".to_owned()), "nothing is fetched"),
        ("no base64", image("data:image/png;base64,@@@".to_owned()), "no base64"),
        ("a sound", image(url("image/png", &wav)), "no picture that is read"),
        ("a picture's beginning", image(url("image/png", &png[..100])), "cannot be read"),
        ("a picture of 2³¹ × 2³¹", image(url("image/bmp", &bitmap(i32::MAX as u32, i32::MAX as u32))), "too large"),
        ("a picture of 60,000 × 60,000", image(url("image/bmp", &bitmap(60_000, 60_000))), "the limit is 67108864"),
        ("a picture of 1 × 10,000", image(url("image/bmp", &bitmap(1, 10_000))), "200 times"),
        ("nothing", image(url("image/png", b"")), "empty"),
        ("a header that lies", sound(&lies), "cannot be read"),
        ("a sound of one sample", sound(&[&wav[..44], &[1, 0]].concat()), "its header says"),
        ("a text", sound(b"hello"), "no sound that is read"),
        ("a picture that moves not", json!({"type": "video_url", "video_url": {"url": url("video/mp4", &png)}}), "no video that is read"),
        ("another kind", json!({"type": "smell", "smell": "x"}), "not supported"),
    ];
    for (what, part, rule) in cases {
        let response = door.post("/v1/chat/completions", &chat(&json!([part, words])));
        let error = &response.json()["error"];
        let message = error["message"].as_str().unwrap_or_default();
        println!("{what}: {} {message}", response.status);
        assert!(
            response.status == 400 && message.contains(rule) && message.contains("messages[0].content[0]"),
            "{what}: {} {}",
            response.status,
            response.body
        );
    }
    assert_eq!(door.post("/v1/chat/completions", &chat(words)).status, 400, "an object is no content");
    assert!(tokens(&door.answer("/v1/chat/completions", &chat(&json!("hello")))).is_array());
}
