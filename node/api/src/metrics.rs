//! Figures for Prometheus.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use runtime::memory::resident_bytes;

use super::Api;

pub(super) async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let mut text = String::new();
    let waiting = api.generation.waiting();
    {
        let counts = api.generation.activity().lock();
        let (sum, count) = counts.first_tokens;
        gauge(&mut text, "confrere_requests_active", "Requests that are being answered.", counts.active() as f64);
        gauge(&mut text, "confrere_requests_waiting", "Requests that wait for their turn.", waiting as f64);
        counter(&mut text, "confrere_answers_total", "Requests that were answered.", counts.answers as f64);
        counter(&mut text, "confrere_failed_total", "Requests that failed on the way.", counts.failed as f64);
        counter(&mut text, "confrere_abandoned_total", "Requests whose clients went away.", counts.abandoned as f64);
        counter(&mut text, "confrere_tokens_total", "Tokens that were generated.", counts.tokens as f64);
        counter(&mut text, "confrere_prompt_tokens_total", "Tokens of prompts that were taken in.", counts.prompt_tokens as f64);
        head(&mut text, "confrere_first_token_seconds", "From a request to the first token of its answer.", "summary");
        let _ = writeln!(text, "confrere_first_token_seconds_sum {}\nconfrere_first_token_seconds_count {count}", sum.as_secs_f64());
        head(&mut text, "confrere_expert_uses_total", "Uses of experts, by where each was.", "counter");
        let experts = counts.experts;
        for (place, uses) in [("ram", experts.ram), ("disk", experts.disk), ("remote", experts.remote), ("fetched", experts.fetched)] {
            let _ = writeln!(text, "confrere_expert_uses_total{{place=\"{place}\"}} {uses}");
        }
        counter(
            &mut text,
            "confrere_expert_bytes_fetched_total",
            "Bytes of experts that requests waited for.",
            counts.bytes_fetched as f64,
        );
    }
    if let Ok(stat) = api.library.open.store.stat() {
        gauge(&mut text, "confrere_store_bytes", "Bytes of blobs in the store.", stat.bytes as f64);
        gauge(&mut text, "confrere_store_blobs", "Blobs in the store.", stat.blobs as f64);
        gauge(&mut text, "confrere_store_quarantined", "Blobs that were found damaged.", stat.quarantined as f64);
        gauge(&mut text, "confrere_disk_free_bytes", "Bytes that the store's filesystem has left.", stat.disk_free_bytes as f64);
    }
    gauge(&mut text, "confrere_peers_connected", "Peers with a direct connection.", api.network.peers.borrow().connected.len() as f64);
    let offset_s = api.network.records.lock().clock_offset_ms().unwrap_or(0) as f64 / 1e3;
    gauge(&mut text, "confrere_clock_offset_seconds", "How far most peers' clocks are ahead of this node's; 0 when they agree.", offset_s);
    gauge(&mut text, "process_resident_memory_bytes", "Memory that the process has.", resident_bytes() as f64);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

fn head(text: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn gauge(text: &mut String, name: &str, help: &str, value: f64) {
    head(text, name, help, "gauge");
    let _ = writeln!(text, "{name} {value}");
}

fn counter(text: &mut String, name: &str, help: &str, value: f64) {
    head(text, name, help, "counter");
    let _ = writeln!(text, "{name} {value}");
}
