//! Sampling defaults and stop tokens: `generation_config.json`, and what `config.json` adds.

use protocol::manifest::GenerationDefaults;
use serde_json::Value;

/// Returns sampling defaults and stop tokens; `config` fills in what `generation` leaves out.
pub fn parse_generation(config: &Value, generation: &Value) -> GenerationDefaults {
    let number = |name: &str| generation[name].as_f64().map(|value| value as f32);
    let thinker = &config["thinker_config"]["text_config"]["eos_token_id"];
    let eos = [&generation["eos_token_id"], &config["eos_token_id"], &config["text_config"]["eos_token_id"], thinker];
    let sampled = generation["do_sample"].as_bool().unwrap_or(false);
    let strings = generation["stop_strings"]
        .as_array()
        .into_iter()
        .flatten()
        .chain(generation["stop_strings"].is_string().then(|| &generation["stop_strings"]));
    GenerationDefaults {
        // Each source may know of one that the others leave out: an answer ends at any of them.
        eos_token_ids: eos.into_iter().flat_map(token_ids).fold(Vec::new(), |mut all, id| {
            if !all.contains(&id) {
                all.push(id);
            }
            all
        }),
        stop_strings: strings.filter_map(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned).collect(),
        // Without do_sample, transformers takes the likeliest token.
        temperature: if sampled { number("temperature").unwrap_or(1.0) } else { 0.0 },
        top_k: generation["top_k"].as_u64().filter(|_| sampled).unwrap_or(0) as u32,
        top_p: number("top_p").filter(|_| sampled).unwrap_or(1.0),
        repetition_penalty: number("repetition_penalty").unwrap_or(1.0),
    }
}

fn token_ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
    ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn greedy_unless_the_checkpoint_samples() {
        let generation = json!({"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "do_sample": false});
        let greedy = parse_generation(&json!({"eos_token_id": 1}), &generation);
        assert_eq!((greedy.temperature, greedy.top_k, greedy.eos_token_ids), (0.0, 0, vec![7, 9, 1]));
        let sampled = parse_generation(&json!({"eos_token_id": 1}), &json!({"do_sample": true, "temperature": 0.5, "stop_strings": "x"}));
        assert_eq!((sampled.temperature, sampled.eos_token_ids, sampled.stop_strings), (0.5, vec![1], vec!["x".to_owned()]));
    }
}
