//! Which experts serve a domain, as this node's own profile of a model has it.

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use protocol::ExpertSlot;
use protocol::profile::lift::{FALSE_DISCOVERY_RATE, Ranked, ranking};
use protocol::profile::{Modality, ProfileBody};
use serde_json::{Value, json};

use crate::data_dir::{LocalModel, OpenDataDir};

/// The body of this node's own profile of a model, if there is one.
pub fn own_body(open: &OpenDataDir, found: &LocalModel) -> Result<Option<ProfileBody>, Failure> {
    let Some(profile) = open.dir.profile(found.id)? else { return Ok(None) };
    let Some(bytes) = open.store.read(&profile.body.hash, now_ms())? else { return Ok(None) };
    let slots: Vec<_> = found.manifest.text().placed_experts().map(|(slot, _)| slot).collect();
    let body = ProfileBody::from_bytes(&bytes, (found.id, profile.probes), &slots);
    body.map(Some).map_err(|error| Failure::new(Kind::Integrity, error.to_string()).about(format_args!("profile of {}", found.name)))
}

/// Refuses a layer that the model does not have, or that has no experts.
pub fn check_layer(found: &LocalModel, layer: Option<u32>) -> Result<(), Failure> {
    let layers: Vec<_> = found.manifest.decoder().moe_layers().collect();
    match layer {
        Some(layer) if !layers.contains(&layer) => {
            let (first, last) = (layers.first().copied().unwrap_or(0), layers.last().copied().unwrap_or(0));
            Err(Failure::new(
                Kind::Usage,
                format!("{} has no layer {layer} with experts; they are in layers {first} to {last}", found.name),
            ))
        }
        _ => Ok(()),
    }
}

pub fn no_profile(model: &str) -> Failure {
    Failure::new(Kind::NotFound, format!("there is no profile of {model}; confrere profile build {model} makes one"))
}

/// The model that was named, or the only one with a profile.
pub fn model_of(open: &OpenDataDir, model: Option<&str>) -> Result<LocalModel, Failure> {
    if let Some(model) = model {
        return open.local(model);
    }
    let profiled = open.dir.profiled_models();
    match &profiled[..] {
        [model] => open.local(&model.to_string()),
        [] => Err(Failure::new(
            Kind::NotFound,
            "no model here has a profile; confrere profile build MODEL makes one, --federation asks the peers",
        )),
        _ => Err(Failure::new(Kind::Usage, "more than one model here has a profile; say which with --model")),
    }
}

/// What experts are asked for.
#[derive(Clone, Debug)]
pub struct Subject {
    domain: Option<String>,
    modality: Option<Modality>,
}

impl Subject {
    /// A domain, its tokens of a modality, or all tokens of a modality.
    pub fn new(domain: Option<String>, modality: Option<&str>) -> Result<Self, Failure> {
        let known = || Modality::ALL.map(Modality::name).join(", ");
        let named = |name| {
            Modality::named(name).ok_or_else(|| Failure::new(Kind::Usage, format!("no modality is called {name} (known: {})", known())))
        };
        let modality = modality.map(named).transpose()?;
        if domain.is_none() && modality.is_none() {
            return Err(Failure::new(Kind::Usage, format!("a domain is missing, or a modality ({})", known())));
        }
        Ok(Self { domain, modality })
    }

    /// What people see.
    pub fn text(&self) -> String {
        let parts = [self.domain.as_deref(), self.modality.map(Modality::name)];
        parts.into_iter().flatten().collect::<Vec<_>>().join("/")
    }

    /// The experts that serve it, as a body of a profile has them; `None` where that says nothing of it.
    pub fn ranking(&self, body: &ProfileBody) -> Option<Vec<Ranked>> {
        match (&self.domain, self.modality) {
            (Some(domain), Some(modality)) => Some(ranking(body, body.domain_of(domain, modality)?)),
            (Some(domain), None) => Some(ranking(body, body.domain(domain)?)),
            (None, modality) => {
                let body = body.by_modality();
                Some(ranking(&body, body.domain(modality?.name())?))
            }
        }
    }

    /// The domain, where it is one.
    pub fn domain(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// Says what a body knows instead.
    fn unknown(&self, body: &ProfileBody) -> Failure {
        let known: Vec<_> = body.names().into_iter().map(str::to_owned).collect();
        match (&self.domain, self.modality) {
            (Some(domain), _) if body.domain(domain).is_none() => no_such_domain(domain, &known),
            (Some(domain), modality) => {
                Failure::new(Kind::NotFound, format!("domain {domain} has no tokens of {}", modality.map_or("", Modality::name)))
            }
            (None, modality) => {
                Failure::new(Kind::NotFound, format!("the profile is by probes without {}", modality.map_or("", Modality::name)))
            }
        }
    }
}

/// The experts that serve a domain or a modality, best first, as this node's own profile has them.
pub fn domain_json(open: &OpenDataDir, found: &LocalModel, subject: &Subject, layer: Option<u32>, top: usize) -> Result<Value, Failure> {
    let body = own_body(open, found)?.ok_or_else(|| no_profile(&found.name))?;
    let ranked = subject.ranking(&body).ok_or_else(|| subject.unknown(&body))?;
    check_layer(found, layer)?;
    let experts: Vec<_> = found.manifest.text().placed_experts().collect();
    let rows: Vec<_> = ranked.into_iter().filter(|one| layer.is_none_or(|layer| experts[one.expert].0.layer == layer)).collect();
    let usage = open.dir.usage(found.id, experts.len())?;
    let (tested, specialists) = (rows.len(), rows.iter().filter(|one| one.is_specialist()).count());
    let row = |one: &Ranked| {
        let (slot, expert) = experts[one.expert];
        let mut row = row_json(slot, one, open.store.contains(&expert.blob.hash));
        row["used_here"] = json!(usage[one.expert].iter().sum::<u64>());
        row
    };
    let rows: Vec<_> = rows.iter().take(top).map(row).collect();
    Ok(json!({
        "model": found.id.to_string(), "name": found.name, "domain": subject.text(), "probes": body.probes.to_string(), "precision": found.manifest.precision_text(),
        "tested": tested, "specialists": specialists, "false_discovery_rate": FALSE_DISCOVERY_RATE, "experts": rows,
    }))
}

/// The leading domain of each expert, by the number of the domain, and the lower bound of its lift there; −1 and 0 where it has none.
pub(crate) fn leading_domains(body: &ProfileBody) -> (Vec<i32>, Vec<f64>) {
    let (mut leading, mut lift) = (vec![-1; body.experts.len()], vec![0.0; body.experts.len()]);
    for domain in 0..body.domains.len() {
        for one in ranking(body, domain).iter().filter(|one| one.is_specialist()) {
            if one.lift.lower > lift[one.expert] {
                (leading[one.expert], lift[one.expert]) = (domain as i32, one.lift.lower);
            }
        }
    }
    (leading, lift)
}

/// Every expert of a model with its leading domain, as this node's own profile has it; without one, no domains.
pub fn map_json(open: &OpenDataDir, found: &LocalModel) -> Result<Value, Failure> {
    let decoder = found.manifest.decoder();
    let (names, (leading, lift)) = match own_body(open, found)? {
        Some(body) => ((0..body.domains.len()).map(|number| body.label(number)).collect(), leading_domains(&body)),
        None => (Vec::new(), (vec![-1; found.manifest.text().experts.len()], vec![0.0; found.manifest.text().experts.len()])),
    };
    Ok(json!({
        "model": found.id.to_string(), "name": found.name, "layers": decoder.moe_layers().collect::<Vec<_>>(),
        "experts_per_layer": decoder.experts(), "domains": names, "domain": leading, "lift": lift,
    }))
}

/// Uses by tokens that are not of text, for the modalities that a model takes in.
pub fn by_modality(found: &LocalModel, uses: impl Fn(usize) -> Value) -> Value {
    let takes = [(Modality::Image, found.manifest.vision().is_some()), (Modality::Audio, found.manifest.audio().is_some())];
    takes.into_iter().filter(|(_, takes)| *takes).map(|(modality, _)| (modality.name().to_owned(), uses(modality as usize))).collect()
}

/// The number of an expert in the order of a profile's body.
pub fn number_of(found: &LocalModel, layer: u32, expert: u32) -> Result<usize, Failure> {
    check_layer(found, Some(layer))?;
    let number = found.manifest.text().placed_experts().position(|(slot, _)| slot == ExpertSlot::text(layer, expert));
    number.ok_or_else(|| Failure::new(Kind::NotFound, format!("layer {layer} of {} has no expert {expert}", found.name)))
}

/// What is known here of one expert: what it is, how often it was used, and what this node's own profile says of it.
pub fn expert_json(open: &OpenDataDir, found: &LocalModel, number: usize) -> Result<Value, Failure> {
    let (slot, expert) = found.manifest.text().placed_experts().nth(number).expect("the model has as many");
    let uses = open.dir.usage(found.id, found.manifest.text().experts.len())?[number];
    let (domains, profile) = own_body(open, found)?.map_or((json!([]), Value::Null), |body| profile_of(&body, number));
    Ok(json!({
        "model": found.id.to_string(), "layer": slot.layer, "expert": slot.expert, "hash": expert.blob.hash.to_string(),
        "bytes": expert.blob.length, "precision": expert.precision.name(), "here": open.store.contains(&expert.blob.hash),
        "uses": uses.iter().sum::<u64>(), "uses_by_modality": by_modality(found, |modality| json!(uses[modality])),
        "domains": domains, "profile": profile,
    }))
}

/// What a profile says of an expert in each domain, and in all.
fn profile_of(body: &ProfileBody, number: usize) -> (Value, Value) {
    let domains = |body: &ProfileBody| {
        let of = |domain: usize| ranking(body, domain).into_iter().find(|one| one.expert == number);
        (0..body.domains.len()).filter_map(|domain| Some((body.label(domain), of(domain)?))).collect::<Vec<_>>()
    };
    let row = |(name, one): &(String, Ranked)| {
        json!({
            "name": name, "lift": one.lift.value, "lower": one.lift.lower, "upper": one.lift.upper, "q": one.q_value,
            "routed": one.counts.routed, "trials": one.counts.trials, "hits": one.counts.hits, "specialist": one.is_specialist(),
        })
    };
    let by_modality = domains(&body.by_modality());
    let specialist = by_modality.iter().filter(|(_, one)| one.is_specialist());
    let primary = specialist.max_by(|a, b| a.1.lift.lower.total_cmp(&b.1.lift.lower)).map(|(name, _)| name);
    let (counts, all) = (&body.experts[number], body.domains.iter().map(|total| total.tokens).sum::<u64>());
    let share = |of: u64, all: u64| of as f64 / all.max(1) as f64;
    let coactive = counts.coactive.iter().map(|&(expert, count)| json!({"expert": expert, "share": share(count.into(), counts.tokens)}));
    let profile = json!({
        "probes": body.probes.to_string(), "primary_modality": primary, "modalities": by_modality.iter().map(row).collect::<Value>(),
        "activation_frequency": share(counts.tokens, all), "coactive": coactive.collect::<Value>(),
    });
    (domains(body).iter().map(row).collect(), profile)
}

/// No domain has that name; says which there are, and which it may have been.
pub(crate) fn no_such_domain(name: &str, known: &[String]) -> Failure {
    let near = known.iter().map(|known| (strsim::damerau_levenshtein(name, known), known)).min();
    let near = near.filter(|(distance, known)| distance * 3 <= known.len()).map(|(_, known)| format!("; did you mean {known}?"));
    Failure::new(Kind::NotFound, format!("no domain is called {name} (known: {}){}", known.join(", "), near.unwrap_or_default()))
}

pub fn row_json(slot: ExpertSlot, one: &Ranked, here: bool) -> Value {
    json!({
        "layer": slot.layer, "expert": slot.expert, "lift": one.lift.value, "lift_lower": one.lift.lower, "lift_upper": one.lift.upper,
        "q": one.q_value, "specialist": one.is_specialist(), "routed": one.counts.routed, "trials": one.counts.trials, "hits": one.counts.hits,
        "helps_lower": one.helps_lower, "here": here,
    })
}
