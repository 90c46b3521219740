//! `confrere join`: all that one's own second device needs. Trusts the ticket's key, remembers its addresses, learns its models.

use base::failure::{Failure, Kind};
use base::output::{note, print_json, print_line};
use clap::Args;
use protocol::ticket::Ticket;
use runtime::command::{Context, Held, PeerArgs};
use runtime::federation::{Federation, PeerOptions};
use runtime::pulling::{introduce, learn};
use serde_json::{Value, json};

#[derive(Args)]
pub(super) struct JoinArgs {
    /// The ticket that `confrere serve` prints
    ticket: Ticket,
    #[command(flatten)]
    peers: PeerArgs,
}

pub(super) fn join(context: &Context, args: &JoinArgs) -> Result<(), Failure> {
    let open = match context.open()? {
        Held::Here(open) => open,
        Held::Daemon(daemon) => {
            context.only_given(&["ticket"])?;
            let ticket = json!({"ticket": args.ticket.to_string()});
            let joined = context.wait(daemon.post("/api/join", &ticket))?;
            return tell(context, &joined);
        }
    };
    let joined = introduce(&open.dir, &args.ticket, &args.peers.peers)?;
    // This node alone is asked: what others call their models is not its business.
    let options = PeerOptions { peers: joined.addresses, ..args.peers.options() };
    let federation = Federation::connect_to(context.runtime.handle(), &open.dir, options, context.offline)?;
    let (models, answers) = match federation.listing() {
        Ok(listing) => (learn(&open, &federation, listing)?, Value::Null),
        Err(failure) if failure.kind == Kind::NoPeers => (Vec::new(), json!(failure.message)),
        Err(failure) => return Err(failure),
    };
    let models: Vec<_> = models.iter().map(|model| json!({"name": model.name, "id": model.id.to_string()})).collect();
    tell(context, &json!({"node": joined.node.to_string(), "models": models, "silent": answers}))
}

fn tell(context: &Context, joined: &Value) -> Result<(), Failure> {
    note(&format!("joined {}: its models are trusted", joined["node"].as_str().unwrap_or_default()));
    if let Some(why) = joined["silent"].as_str() {
        note(&format!("it does not answer now ({why}); its models can be run by id once it does"));
    }
    if context.json {
        return print_json(joined);
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let models = joined["models"].as_array().into_iter().flatten();
    models.map(|model| format!("{}  {}", text(&model["id"]), text(&model["name"]))).try_for_each(|line| print_line(&line))
}
