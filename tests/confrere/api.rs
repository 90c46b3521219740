//! The HTTP API as programs use it: the same tokens alone and among neighbours, errors, turns, and an end that nobody overlooks.
#![expect(clippy::disallowed_methods, reason = "how long a process takes is told by a clock")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::binary::{Node, Serving, api_json, free_port, http_get, signal_process};
use crate::support::shipped_model;

/// A node with the shipped model that serves its API.
pub(crate) struct Door {
    pub(crate) node: Node,
    pub(crate) serving: Serving,
    pub(crate) api: String,
    id: String,
}

impl Door {
    fn open(precision: &str, more: &[&str]) -> Self {
        let node = Node::new();
        let ended = node.run(&["import", crate::binary::text(&shipped_model()), "--name", "m", "--precision", precision]);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let id = ended.out.lines().last().expect("the id").to_owned();
        Self::of(node, id, more)
    }

    pub(crate) fn of(node: Node, id: String, more: &[&str]) -> Self {
        let api = format!("127.0.0.1:{}", free_port());
        let serving = node.serve_with(&[&["--listen", "/ip4/127.0.0.1/tcp/0", "--api", &api], more].concat());
        Self { node, serving, api, id }
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        Response::read(send(&self.api, path, body))
    }

    /// The answer to a request that must have one.
    pub(crate) fn answer(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()
    }

    /// The names of the models that it has.
    pub(crate) fn answer_models(&self) -> Vec<String> {
        let models = api_json(&self.api, "/api/models");
        models.as_array().expect("a list").iter().map(|model| model["name"].as_str().expect("a name").to_owned()).collect()
    }

    fn active(&self) -> u64 {
        api_json(&self.api, "/api/node")["generation"]["active"].as_u64().expect("a count")
    }
}

/// Sends a request; what follows can be read.
fn send(api: &str, path: &str, body: &Value) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(api).expect("it listens");
    let body = body.to_string();
    let head = format!("POST {path} HTTP/1.1\r\nHost: {api}\r\nContent-Type: application/json\r\nConnection: close\r\n");
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).expect("written");
    BufReader::new(stream)
}

pub(crate) struct Response {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: String,
}

impl Response {
    fn read(mut from: BufReader<TcpStream>) -> Self {
        let mut text = String::new();
        from.read_to_string(&mut text).expect("readable");
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in {text:?}"));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let body = if head.to_lowercase().contains("transfer-encoding: chunked") { unchunked(body) } else { body.to_owned() };
        Self { status, head: head.to_lowercase(), body }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{}: {error}", self.body))
    }

    /// The data of each event.
    fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }
}

fn unchunked(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).expect("a length");
        text.push_str(&rest[..length]);
        body = &rest[(length + 2).min(rest.len())..];
    }
    text
}

fn completion(prompt: &str, more: &Value) -> Value {
    let mut body = json!({"model": "m", "prompt": prompt, "max_tokens": 40, "seed": 7, "return_token_ids": true});
    for (name, value) in more.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

const PROMPTS: [&str; 8] =
    ["fn main() {", "Once upon a time", "def f(x):", "春", "The court finds", "1 + 1 =", "struct Point {", "She said that she would"];

/// Tokens of an answer.
fn tokens(answer: &Value) -> &Value {
    &answer["choices"][0]["token_ids"]
}

#[test]
fn tokens_are_those_of_run_alone_and_among_neighbours() {
    let node = Node::new();
    let id = node.run(&["import", crate::binary::text(&shipped_model()), "--name", "m", "--precision", "q8"]).out;
    let mut alone = Vec::new();
    for (number, prompt) in PROMPTS.iter().enumerate() {
        let temperature = if number.is_multiple_of(2) { "0" } else { "0.9" };
        let run = ["run", "m", prompt, "--raw", "--max-tokens", "40", "--seed", "7", "--temperature", temperature];
        alone.push(node.json(&run)["tokens"].clone());
    }
    let door = Door::of(node, id, &[]);
    let ask = |number: usize| {
        let temperature = if number.is_multiple_of(2) { 0.0 } else { 0.9 };
        door.answer("/v1/completions", &completion(PROMPTS[number], &json!({"temperature": temperature})))
    };
    for (number, alone) in alone.iter().enumerate() {
        assert_eq!(tokens(&ask(number)), alone, "{}", PROMPTS[number]);
    }
    for _ in 0..4 {
        std::thread::scope(|scope| {
            let answering: Vec<_> = (0..PROMPTS.len()).map(|number| scope.spawn(move || ask(number))).collect();
            for (number, thread) in answering.into_iter().enumerate() {
                let answer = thread.join().expect("answered");
                assert_eq!(tokens(&answer), &alone[number], "{}", PROMPTS[number]);
            }
        });
    }
    // A conversation that is gone on with need not be taken in again, and that changes nothing either.
    let long = "fn main() {\n    let mut total = 0;\n    for i in 0..10 {\n        total += i;\n    }\n";
    let first = door.answer("/v1/completions", &completion(long, &json!({"temperature": 0.0})));
    let again = door.answer("/v1/completions", &completion(long, &json!({"temperature": 0.0})));
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().is_some_and(|cached| cached >= 16), "{again}");
    assert_eq!(tokens(&first), tokens(&again));
}

#[test]
fn a_stream_says_the_same_as_the_whole_and_ends_as_it_should() {
    let door = Door::open("q8", &[]);
    let more = json!({"temperature": 0.8, "stop": ["}"], "logprobs": 2});
    let whole = door.answer("/v1/completions", &completion(PROMPTS[0], &more));
    let mut request = completion(PROMPTS[0], &more);
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let stream = door.post("/v1/completions", &request);
    assert!(stream.head.contains("text/event-stream"), "{}", stream.head);
    let events = stream.events();
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|data| serde_json::from_str(data).expect("JSON")).collect();
    let same = |name: &str| chunks.iter().all(|chunk| chunk[name] == chunks[0][name]);
    assert!(same("id") && same("created") && same("model"), "{chunks:?}");
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().expect("text"));
    let ids: Vec<_> = chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).flatten().cloned().collect();
    assert_eq!(&Value::from(ids), tokens(&whole));
    let reasons: Vec<_> = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).collect();
    assert_eq!((reasons.len(), &reasons[0]["choices"][0]["finish_reason"]), (1, &whole["choices"][0]["finish_reason"]));
    let last = chunks.last().expect("chunks");
    assert_eq!(
        (last["choices"].as_array().map(Vec::len), &last["usage"]["completion_tokens"]),
        (Some(0), &whole["usage"]["completion_tokens"])
    );
    let experts = &whole["usage"]["x_experts"];
    let sum: u64 = ["ram", "disk", "remote", "fetched"].iter().filter_map(|name| experts[name].as_u64()).sum();
    assert!(sum > 0 && experts["needed"] == sum, "{experts}");
}

#[test]
fn a_client_that_goes_away_makes_room_at_once() {
    let door = Door::open("q8", &[]);
    let endless = completion(PROMPTS[1], &json!({"max_tokens": 400, "stream": true, "temperature": 1.0, "stop": null}));
    door.answer("/v1/completions", &completion("a", &json!({"max_tokens": 1})));
    for stream in [true, false] {
        let mut request = endless.clone();
        request["stream"] = json!(stream);
        let clients: Vec<_> = (0..16).map(|_| send(&door.api, "/v1/completions", &request)).collect();
        let began = Instant::now();
        while door.active() == 0 && began.elapsed() < Duration::from_secs(2) {}
        drop(clients);
        let gone = Instant::now();
        while door.active() > 0 {
            assert!(gone.elapsed() < Duration::from_secs(2), "{} still active (stream: {stream})", door.active());
        }
        println!("free after {:?} (stream: {stream})", gone.elapsed());
    }
    let counts = http_get(&door.api, "/metrics", &door.api);
    let abandoned =
        counts.lines().find_map(|line| line.strip_prefix("confrere_abandoned_total ")).and_then(|count| count.parse::<f64>().ok());
    assert!(abandoned.is_some_and(|count| count > 0.0), "{counts}");
}

/// Report 8: requests whose clients have gone take no place, neither that of their user nor that of all.
#[test]
fn the_queue_forgets_those_who_have_gone() {
    let door = Door::open("q8", &["--model", "m"]);
    let long = completion(PROMPTS[1], &json!({"max_tokens": 400, "temperature": 1.0, "stream": true}));
    let under_way: Vec<_> = (0..12).map(|_| send(&door.api, "/v1/completions", &long)).collect();
    let waiting = |count: u64| {
        let began = Instant::now();
        while api_json(&door.api, "/api/node")["generation"]["waiting"] != count {
            assert!(began.elapsed() < Duration::from_secs(20), "{count}");
        }
    };
    let gone: Vec<_> = (0..16).map(|_| send(&door.api, "/v1/completions", &long)).collect();
    waiting(16);
    assert_eq!(door.post("/v1/completions", &long).status, 429, "all places of one user are taken");
    drop(gone);
    waiting(0);
    let next = door.post("/v1/completions", &completion(PROMPTS[0], &json!({"max_tokens": 1})));
    assert_eq!(next.status, 200, "{}", next.body);
    drop(under_way);
}

#[test]
fn a_full_queue_says_so_and_users_take_turns() {
    let door = Door::open("q8", &["--kv-tokens", "512"]);
    // One at a time fits, so that the others wait.
    let of = |user: &str| completion(PROMPTS[1], &json!({"max_tokens": 400, "temperature": 1.0, "user": user}));
    door.answer("/v1/completions", &completion("a", &json!({"max_tokens": 1})));
    // All ask while the node stands still, so that it finds them all at once however busy the machine is.
    signal_process(door.serving.pid(), "STOP");
    let greedy: Vec<_> = (0..24).map(|_| send(&door.api, "/v1/completions", &of("greedy"))).collect();
    let modest = send(&door.api, "/v1/completions", &of("modest"));
    let began = Instant::now();
    signal_process(door.serving.pid(), "CONT");
    let modest = Response::read(modest);
    let modest_took = began.elapsed();
    assert_eq!(modest.status, 200, "{}", modest.body);
    let statuses: Vec<_> = greedy.into_iter().map(Response::read).collect();
    let all_took = began.elapsed();
    let full: Vec<_> = statuses.iter().filter(|response| response.status == 429).collect();
    assert!(!full.is_empty(), "24 requests of one user, and no refusal");
    assert!(full.iter().all(|response| response.head.contains("retry-after:") && response.json()["error"]["code"] == "queue_full"));
    assert!(statuses.iter().filter(|response| response.status == 200).count() >= 16);
    // He who asks for one waits for one or two others, not for all who wait.
    assert!(modest_took * 2 < all_took, "{modest_took:?} of {all_took:?}");
}

#[test]
fn what_is_wrong_is_refused_in_the_shape_that_clients_read() {
    let door = Door::open("q8", &[]);
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
    let with = |name: &str, value: Value| {
        let mut body = chat.clone();
        body[name] = value;
        body
    };
    let cases = [
        (with("model", json!("other")), 404, json!("model_not_found")),
        (with("tools", json!([{"type": "function", "function": {"name": "f"}}])), 400, json!("unsupported_value")),
        (with("foo", json!(1)), 400, json!("unknown_parameter")),
        (with("temperature", json!(3)), 400, Value::Null),
        (with("messages", json!([{"role": "user", "content": "word ".repeat(2000)}])), 400, json!("context_length_exceeded")),
    ];
    for (body, status, code) in cases {
        let response = door.post("/v1/chat/completions", &body);
        let error = &response.json()["error"];
        assert_eq!((response.status, &error["code"]), (status, &code), "{error}");
        assert!(error["message"].is_string() && error["type"].is_string() && !error["param"].is_null(), "{error}");
    }
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let mut stream = TcpStream::connect(&door.api).expect("it listens");
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nConnection: close\r\n", door.api);
    write!(stream, "{head}Content-Length: {}\r\n\r\n{deep}", deep.len()).expect("written");
    assert_eq!(Response::read(BufReader::new(stream)).status, 400);
    let mut stream = TcpStream::connect(&door.api).expect("it listens");
    write!(stream, "{head}Content-Length: 1073741824\r\n\r\n").expect("written");
    let mut first = String::new();
    BufReader::new(stream).read_line(&mut first).expect("an answer");
    assert!(first.contains(" 413 "), "{first}");
}

#[test]
fn strangers_and_their_pages_are_refused_everywhere() {
    let node = Node::new();
    let door = Door::of(node, String::new(), &[]);
    let document = api_json(&door.api, "/openapi.json");
    let paths: Vec<_> = document["paths"].as_object().expect("paths").keys().map(|path| path.replace(['{', '}'], "")).collect();
    assert!(paths.len() > 15);
    for path in paths.iter().map(String::as_str).chain(["/", "/dashboard/app.js", "/nothing"]) {
        // That it is there, a node tells anybody.
        let status = if path == "/health" { "HTTP/1.1 200" } else { "HTTP/1.1 403" };
        assert!(http_get(&door.api, path, "evil.example").starts_with(status), "{path}");
        let origin = format!("{}\r\nOrigin: http://evil.example", door.api);
        assert!(http_get(&door.api, path, &origin).starts_with(status), "{path}");
    }
    // Other users of this machine may ask, and change nothing.
    for path in ["/api/join", "/api/pull"] {
        assert_eq!(door.post(path, &json!({"ticket": "x", "model": "m"})).status, 401, "{path}");
    }
    // Everywhere but on this machine alone, a token is needed; the node makes one.
    let node = Node::new();
    let port = free_port();
    let _serving = node.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--api", &format!("0.0.0.0:{port}")]);
    let api = format!("127.0.0.1:{port}");
    let token = std::fs::read_to_string(node.path().join("api-token")).expect("a token");
    for path in &paths {
        let open = path == "/health";
        assert!(http_get(&api, path, &api).starts_with(if open { "HTTP/1.1 200" } else { "HTTP/1.1 401" }), "{path}");
        let wrong = format!("{api}\r\nAuthorization: Bearer wrong");
        assert!(http_get(&api, path, &wrong).starts_with(if open { "HTTP/1.1 200" } else { "HTTP/1.1 401" }), "{path}");
    }
    let right = format!("{api}\r\nAuthorization: Bearer {}", token.trim());
    assert!(http_get(&api, "/api/node", &right).starts_with("HTTP/1.1 200"));
    // The command line finds the token.
    assert_eq!(node.json(&["ls"]), json!([]));
}

#[test]
fn a_node_that_is_told_to_stop_ends_what_it_has_begun() {
    let door = Door::open("q8", &["--model", "m"]);
    let request = completion(PROMPTS[1], &json!({"max_tokens": 450, "stream": true, "temperature": 1.0}));
    let clients: Vec<_> = (0..8).map(|_| send(&door.api, "/v1/completions", &request)).collect();
    let began = Instant::now();
    while door.active() == 0 && began.elapsed() < Duration::from_secs(5) {}
    signal_process(door.serving.pid(), "TERM");
    let told = Instant::now();
    for client in clients {
        let response = Response::read(client);
        let complete = response.events().last() == Some(&"[DONE]");
        assert!(complete || response.body.contains("event: error") || response.status == 503, "{} {}", response.status, response.body);
    }
    let Door { serving, node, .. } = door;
    assert_eq!(serving.stop(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(30), "{:?}", told.elapsed());
    assert!(!node.path().join("api.json").exists());
}

#[test]
fn commands_ask_the_node_that_has_the_data_directory() {
    let node = Node::new();
    let id = node.run(&["import", crate::binary::text(&shipped_model()), "--name", "m", "--precision", "q8"]).out.trim().to_owned();
    let built = node.run(&["profile", "build", "m", "--budget", "0s"]);
    assert_eq!(built.code, Some(0), "{}", built.err);
    let commands: [&[&str]; 7] = [
        &["ls"],
        &["show", "m"],
        &["show", &id[..8], "--blobs"],
        &["experts", "which", "code", "--top", "3"],
        &["experts", "map", "m"],
        &["repo", "stat"],
        &["trust", "ls"],
    ];
    let ask = || {
        let ask = |command: &&[&str]| {
            let (text, json) = (node.run(command), node.run(&[*command, &["--json"]].concat()));
            assert_eq!((text.code, json.code), (Some(0), Some(0)), "{command:?}: {}{}", text.err, json.err);
            (text.out, json.out)
        };
        commands.iter().map(ask).collect::<Vec<_>>()
    };
    let run = ["run", "m", "fn main() {", "--raw", "--max-tokens", "20", "--temperature", "0"];
    let answer = node.json(&run); // first, since uses are counted
    let alone = ask();
    let serving = node.serve();
    let by_daemon = ask();
    for ((command, (alone, alone_json)), (by_daemon, by_daemon_json)) in commands.iter().zip(alone).zip(by_daemon) {
        let same = |text: &str| {
            text.lines().filter(|line| !line.contains("disk free") && !line.contains("disk_free")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(same(&alone), same(&by_daemon), "{command:?}");
        let (alone, by_daemon): (Value, Value) =
            (serde_json::from_str(&alone_json).expect("JSON"), serde_json::from_str(&by_daemon_json).expect("JSON"));
        if command[0] != "repo" && command[0] != "ls" {
            assert_eq!(alone, by_daemon, "{command:?}");
        }
    }
    let served = node.json(&run);
    assert_eq!((&served["tokens"], &served["text"], &served["stop_reason"]), (&answer["tokens"], &answer["text"], &answer["stop_reason"]));
    assert_eq!(node.run(&["run", "other", "x"]).code, Some(3));
    assert_eq!(node.run(&["show", "other"]).code, Some(3));
    assert_eq!(node.run(&["experts", "which", "cooking"]).code, Some(3));
    assert_eq!(node.run(&["rm", "m"]).code, Some(8));
    // What the node would not heed is not ignored.
    for given in [&["--offline"][..], &["--execute-at", "any"], &["--threads", "1"], &["--peer", "/ip4/127.0.0.1/tcp/1"], &["--no-log"]] {
        let ended = node.run(&[&run[..], given].concat());
        assert_eq!(ended.code, Some(8), "{given:?}: {}", ended.err);
        assert!(ended.err.contains(&format!("{} would not be heeded", given[0])), "{}", ended.err);
    }
    assert_eq!(serving.stop(), Some(0));
}

#[test]
fn a_node_that_serves_joins_and_pulls() {
    let a = Door::open("q8", &[]);
    let expected = a.answer("/v1/completions", &completion(PROMPTS[0], &json!({"temperature": 0.0})));
    let b = Door::of(Node::new(), a.id.clone(), &[]);
    let joined = b.node.json(&["join", &a.serving.ticket]);
    assert_eq!(joined["models"], json!([{"name": "m", "id": a.id}]), "{joined}");
    let pulled = b.node.json(&["pull", "m", "--experts", "2MB"]);
    let some = pulled["experts"]["have"].as_u64().expect("a count");
    assert!(some > 0 && some < 192 && pulled["bytes_fetched"].as_u64() > Some(2_000_000), "{pulled}");
    assert_eq!(tokens(&b.answer("/v1/completions", &completion(PROMPTS[0], &json!({"temperature": 0.0})))), tokens(&expected));
    assert_eq!(b.node.json(&["pull", "m"])["experts"], json!({"have": 192, "all": 192}));
    assert_eq!(b.node.run(&["pull", &"0".repeat(64)]).code, Some(4));
    assert_eq!(b.node.run(&["join", &b.serving.ticket]).code, Some(2));
    // What has come is offered to others at once.
    let c = Node::new();
    c.trust(&a.node);
    let Door { serving, .. } = a;
    drop(serving);
    let from_b = c.run(&["pull", &b.id, "--peer", &b.serving.address]);
    assert_eq!(from_b.code, Some(0), "{}", from_b.err);
}

#[test]
fn a_node_with_nothing_answers_by_what_it_fetches() {
    let a = Door::open("q8", &[]);
    let expected = a.answer("/v1/completions", &completion(PROMPTS[0], &json!({"temperature": 0.0})));
    let trunk_of_a = || {
        let node = Node::new();
        let joined = node.run(&["join", &a.serving.ticket]);
        assert_eq!(joined.code, Some(0), "{}", joined.err);
        assert_eq!(node.run(&["pull", &a.id, "--trunk"]).code, Some(0));
        Door::of(node, a.id.clone(), &[]) // it knows whom it has joined
    };
    let (b, c) = (trunk_of_a(), trunk_of_a());
    let mut request = completion(PROMPTS[0], &json!({"temperature": 0.0}));
    request["model"] = json!(a.id[..8]);
    // The peer stalls, and a client does not wait for it: its place is free at once, though the peer has ten seconds.
    api_json(&b.api, "/api/experts/map"); // its peer is there
    signal_process(a.serving.pid(), "STOP");
    let client = send(&b.api, "/v1/completions", &request);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(b.active(), 1, "it waits for the peer");
    drop(client);
    let gone = Instant::now();
    while b.active() > 0 {
        assert!(gone.elapsed() < Duration::from_secs(2), "a client that has gone is worked for");
    }
    println!("free after {:?}, though a peer stalls", gone.elapsed());
    signal_process(a.serving.pid(), "CONT");
    let answer = b.answer("/v1/completions", &request);
    assert_eq!(tokens(&answer), tokens(&expected));
    let experts = &answer["usage"]["x_experts"];
    assert!(experts["fetched"].as_u64().is_some_and(|fetched| fetched > 0), "{experts}");
    assert_eq!(experts["peers"], json!([a.serving.socket().1]));
    // Where everything is, as the dashboard shows it.
    let map = api_json(&b.api, "/api/experts/map");
    let places = map["place"].as_array().expect("places");
    assert!(places.iter().any(|place| *place == 1) && places.iter().any(|place| *place == 3), "{places:?}");
    assert!(map["holders"].as_array().is_some_and(|holders| holders.iter().all(|count| *count == 1)));
    // It stalls again, and a node that is told to stop does not wait for it longer than for any other answer.
    drop(b);
    let d = trunk_of_a();
    api_json(&d.api, "/api/experts/map");
    signal_process(a.serving.pid(), "STOP");
    let client = send(&d.api, "/v1/completions", &request);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(d.active(), 1, "it waits for the peer");
    signal_process(d.serving.pid(), "TERM");
    let told = Instant::now();
    let response = Response::read(client);
    assert_eq!((response.status, &response.json()["error"]["type"]), (503, &json!("service_unavailable_error")), "{}", response.body);
    let Door { serving, .. } = d;
    assert_eq!(serving.stop(), Some(0));
    println!("stopped after {:?}, though a peer stalls", told.elapsed());
    signal_process(a.serving.pid(), "CONT");
    // The peer goes, and with it what nobody else has.
    let Door { serving, .. } = a;
    drop(serving);
    let response = c.post("/v1/completions", &request);
    assert_eq!((response.status, &response.json()["error"]["code"]), (503, &json!("no_peers")), "{}", response.body);
}
