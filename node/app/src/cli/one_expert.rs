//! `confrere experts show`: what is known of one expert.

use base::failure::Failure;
use base::output::{human_bytes, note, print_json, print_line};
use clap::Args;
use runtime::command::{Context, Held};
use runtime::specialists::{expert_json, model_of, number_of};
use serde_json::Value;

use super::encoded;

#[derive(Args)]
pub(super) struct ShowArgs {
    /// Its layer
    layer: u32,
    /// Its number there
    expert: u32,
    /// A name, an id or the beginning of an id [default: the only model with a profile]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
}

pub(super) fn show(context: &Context, args: &ShowArgs) -> Result<(), Failure> {
    let json = match context.open()? {
        Held::Here(open) => {
            let found = model_of(&open, args.model.as_deref())?;
            expert_json(&open, &found, number_of(&found, args.layer, args.expert)?)?
        }
        Held::Daemon(daemon) => {
            let model = args.model.as_ref().map_or_else(String::new, |model| format!("?model={}", encoded(model)));
            context.ask(&daemon, &format!("/api/experts/{}/{}{model}", args.layer, args.expert))?
        }
    };
    if context.json {
        return print_json(&json);
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let percent = |value: &Value| format!("{:.1}%", value.as_f64().unwrap_or_default() * 100.0);
    let bytes = human_bytes(json["bytes"].as_u64().unwrap_or_default());
    print_line(&format!("layer {}, expert {}: {}, {bytes}", args.layer, args.expert, text(&json["precision"])))?;
    print_line(&format!("hash {}", text(&json["hash"])))?;
    print_line(&format!("used here {} times", json["uses"]))?;
    let profile = &json["profile"];
    if profile.is_null() {
        note("there is no profile of the model; confrere profile build makes one");
        return Ok(());
    }
    print_line(&format!("takes part in {} of the probes' tokens", percent(&profile["activation_frequency"])))?;
    let primary = profile["primary_modality"].as_str().map_or("no modality more than others", |modality| modality);
    print_line(&format!("serves {primary}"))?;
    let rows = |of: &Value| of.as_array().cloned().unwrap_or_default();
    print_line(&format!("{:<24} {:>6} {:>15} {:>7} {:>7} {:>5}", "domain", "lift", "95%", "routed", "trials", "hits"))?;
    for row in rows(&json["domains"]) {
        let number = |name: &str| row[name].as_f64().unwrap_or_default();
        let bounds = format!("{:.2} to {:.2}", number("lower"), number("upper"));
        let (name, lift) = (text(&row["name"]), number("lift"));
        let [routed, trials, hits] = ["routed", "trials", "hits"].map(|count| row[count].to_string());
        print_line(&format!("{name:<24} {lift:>6.2} {bounds:>15} {routed:>7} {trials:>7} {hits:>5}"))?;
    }
    let together =
        rows(&profile["coactive"]).iter().map(|one| format!("{} ({})", one["expert"], percent(&one["share"]))).collect::<Vec<_>>();
    print_line(&format!("most often with {}", together.join(", ")))
}
