//! Settings from the configuration file: every option that has an environment variable is a key there. Flags go before the environment, the
//! environment before the file, the file before defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base::failure::{Failure, Kind, io_failure};
use base::output::{print, print_json, print_line};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Command, Subcommand};
use serde_json::{Value, json};

/// Says where the file is.
pub(super) const CONFIG_VARIABLE: &str = "CONFRERE_CONFIG";
const VARIABLE_PREFIX: &str = "CONFRERE_";
/// Longest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Print every setting in force, as a configuration file has it
    Show {
        /// Say where each comes from
        #[arg(long)]
        origin: bool,
    },
    /// Print where the configuration file is looked for
    Path,
}

/// An option that may be set in the file.
struct Setting {
    variable: String,
    help: String,
    default: Option<String>,
    is_list: bool,
}

/// What the file says.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Configuration {
    path: PathBuf,
    /// In the words of the command line; lists joined by commas.
    values: BTreeMap<String, String>,
}

impl Configuration {
    /// Reads the file: the one that the environment names, which must be there, or the usual one.
    pub(super) fn read(command: &Command) -> Result<Self, Failure> {
        let named = std::env::var_os(CONFIG_VARIABLE).filter(|name| !name.is_empty()).map(PathBuf::from);
        let usual = || Some(directories::ProjectDirs::from("", "", "confrere")?.config_dir().join("config.toml"));
        let Some(path) = named.clone().or_else(usual) else { return Ok(Self::default()) };
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                return Ok(Self { path, values: BTreeMap::new() });
            }
            Err(error) => return Err(io_failure("read", &path, &error)),
            Ok(about) if about.len() > FILE_BYTES_MAX => {
                return Err(Failure::new(Kind::Usage, format!("{} is no configuration: it has {} bytes", path.display(), about.len())));
            }
            Ok(_) => {}
        }
        let text = std::fs::read_to_string(&path).map_err(|error| io_failure("read", &path, &error))?;
        Self::parse(path, &text, &settings(command))
    }

    fn parse(path: PathBuf, text: &str, settings: &BTreeMap<String, Setting>) -> Result<Self, Failure> {
        let wrong = |what: String| Failure::new(Kind::Usage, format!("{}: {what}", path.display()));
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| wrong(error.to_string().trim_end().to_owned()))?;
        let mut values = BTreeMap::new();
        for (key, value) in table {
            let Some(setting) = settings.get(&key) else {
                let near = settings.keys().map(|known| (strsim::damerau_levenshtein(&key, known), known)).min();
                let near =
                    near.filter(|(distance, known)| distance * 2 <= known.len()).map(|(_, known)| format!("; did you mean {known}?"));
                return Err(wrong(format!("unknown key {key}{}", near.unwrap_or_default())));
            };
            let plain = |value: &toml::Value| match value {
                toml::Value::String(text) => Some(text.clone()),
                toml::Value::Integer(number) => Some(number.to_string()),
                toml::Value::Float(number) => Some(number.to_string()),
                toml::Value::Boolean(flag) => Some(flag.to_string()),
                _ => None,
            };
            let value = match &value {
                toml::Value::Array(list) if setting.is_list => {
                    list.iter().map(plain).collect::<Option<Vec<_>>>().map(|list| list.join(","))
                }
                one => plain(one),
            };
            let rule = if setting.is_list { "a text or a list of texts" } else { "a text, a number, true or false" };
            values.insert(key.clone(), value.ok_or_else(|| wrong(format!("{key} must be {rule}")))?);
        }
        Ok(Self { path, values })
    }

    /// Makes what the file says the default of every option that has the name.
    pub(super) fn apply(&self, command: Command) -> Command {
        let command = command.mut_args(|arg| match key(&arg).and_then(|key| self.values.get(&key)) {
            Some(value) if arg.get_value_delimiter().is_some() => {
                arg.default_values(value.split(',').map(str::to_owned).collect::<Vec<_>>())
            }
            Some(value) => arg.default_value(value.clone()),
            None => arg,
        });
        command.mut_subcommands(|sub| self.apply(sub))
    }

    /// Ends the program with what is wrong with its arguments; says so when it is the file's fault.
    pub(super) fn explain(&self, error: &clap::Error) -> Option<Failure> {
        let (Some(ContextValue::String(value)), ErrorKind::ValueValidation | ErrorKind::InvalidValue) =
            (error.get(ContextKind::InvalidValue), error.kind())
        else {
            return None;
        };
        let given = std::env::args().any(|arg| arg == *value || arg.ends_with(&format!("={value}")));
        let in_file = |of: &str| of.split(',').any(|one| one == value);
        let (key, _) = self.values.iter().find(|(_, of)| !given && in_file(of))?;
        let why = error.to_string();
        let why = why.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Some(Failure::new(Kind::Usage, format!("{}: {key}: {why}", self.path.display())))
    }
}

/// The key of an option, if it may be set in the file.
fn key(arg: &Arg) -> Option<String> {
    let variable = arg.get_env()?.to_str()?;
    (variable != CONFIG_VARIABLE).then(|| variable.trim_start_matches(VARIABLE_PREFIX).to_ascii_lowercase())
}

fn settings(command: &Command) -> BTreeMap<String, Setting> {
    let mut all = BTreeMap::new();
    collect(command, &mut all);
    all
}

fn collect(command: &Command, all: &mut BTreeMap<String, Setting>) {
    for arg in command.get_arguments() {
        let Some(key) = key(arg) else { continue };
        let default = arg.get_default_values().first().map(|value| value.to_string_lossy().into_owned());
        all.entry(key).or_insert_with(|| Setting {
            variable: arg.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
            default,
            is_list: arg.get_value_delimiter().is_some(),
        });
    }
    command.get_subcommands().for_each(|sub| collect(sub, all));
}

pub(super) fn config(
    command: &ConfigCommand,
    (configuration, own): (&Configuration, &Command),
    matches: &ArgMatches,
    is_json: bool,
) -> Result<(), Failure> {
    match command {
        ConfigCommand::Path if is_json => print_json(&json!({"path": configuration.path})),
        ConfigCommand::Path => print_line(&configuration.path.display().to_string()),
        ConfigCommand::Show { origin } => show(configuration, own, matches, is_json, *origin),
    }
}

fn show(configuration: &Configuration, own: &Command, matches: &ArgMatches, is_json: bool, origin: bool) -> Result<(), Failure> {
    let mut text = String::new();
    let mut all = serde_json::Map::new();
    for (key, setting) in settings(own) {
        let (value, from) = in_force(configuration, matches, &key, &setting);
        if is_json {
            all.insert(key, json!({"value": value, "origin": from}));
            continue;
        }
        let from = if origin { format!("  # {from}") } else { String::new() };
        let line = match value {
            Some(value) => format!("{key} = {}{from}", in_toml(&value, setting.is_list)),
            None => format!("# {key} is not set: {}", setting.help),
        };
        text.push_str(&line);
        text.push('\n');
    }
    if is_json { print_json(&Value::Object(all)) } else { print(&text) }
}

/// A setting's value and where it comes from.
fn in_force(configuration: &Configuration, matches: &ArgMatches, key: &str, setting: &Setting) -> (Option<String>, String) {
    let flag = matches.try_get_raw(key).ok().flatten();
    let by_flag = flag.filter(|_| matches.value_source(key) == Some(clap::parser::ValueSource::CommandLine));
    if let Some(values) = by_flag {
        let values: Vec<_> = values.map(|value| value.to_string_lossy().into_owned()).collect();
        return (Some(values.join(",")), "flag".to_owned());
    }
    if let Ok(value) = std::env::var(&setting.variable) {
        return (Some(value), setting.variable.clone());
    }
    match (configuration.values.get(key), &setting.default) {
        (Some(value), _) => (Some(value.clone()), configuration.path.display().to_string()),
        (None, default) => (default.clone(), "default".to_owned()),
    }
}

fn in_toml(value: &str, is_list: bool) -> String {
    if is_list {
        let list: Vec<_> = value.split(',').map(|one| toml::Value::String(one.to_owned()).to_string()).collect();
        return format!("[{}]", list.join(", "));
    }
    match value.parse::<i64>() {
        Ok(number) => number.to_string(),
        Err(_) if matches!(value, "true" | "false") => value.to_owned(),
        Err(_) => toml::Value::String(value.to_owned()).to_string(),
    }
}

/// Whether a file can be read as a configuration; for `doctor`.
pub(super) fn location(configuration: &Configuration) -> (&Path, usize) {
    (&configuration.path, configuration.values.len())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    fn parse(text: &str) -> Result<Configuration, String> {
        Configuration::parse("c.toml".into(), text, &settings(&Cli::command())).map_err(|failure| failure.message)
    }

    #[test]
    fn every_setting_has_one_name_for_flag_key_and_variable() {
        fn check(command: &Command) {
            for arg in command.get_arguments().filter(|arg| key(arg).is_some()) {
                assert_eq!(key(arg), arg.get_long().map(|long| long.replace('-', "_")), "of {}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn the_file_gives_defaults_and_flags_go_before() {
        let configuration = parse("ram = \"2GiB\"\ndisk = 1000\noffline = true\nexecute_for = [\"any\"]\nupload = \"1MB\"").expect("fine");
        let matches = |line: &[&str]| configuration.apply(Cli::command()).try_get_matches_from(line).expect("fine");
        let all = matches(&["confrere", "--ram", "1GiB", "serve"]);
        assert_eq!((all.get_one::<u64>("ram"), all.get_one::<u64>("disk"), all.get_flag("offline")), (Some(&(1 << 30)), Some(&1000), true));
        let serve = all.subcommand_matches("serve").expect("serve");
        assert_eq!(serve.get_one::<u64>("upload"), Some(&1_000_000));
        assert!(
            !parse("").expect("fine").apply(Cli::command()).try_get_matches_from(["confrere", "serve"]).expect("fine").get_flag("offline")
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        assert_eq!(parse("rma = 1"), Err("c.toml: unknown key rma; did you mean ram?".to_owned()));
        assert_eq!(parse("[ram]"), Err("c.toml: ram must be a text, a number, true or false".to_owned()));
        assert!(parse("ram = ").expect_err("no TOML").contains("c.toml: TOML parse error at line 1"));
        let configuration = parse("ram = \"lots\"").expect("a text");
        let error = configuration.apply(Cli::command()).try_get_matches_from(["confrere", "ls"]).expect_err("no size");
        let failure = configuration.explain(&error).expect("the file's fault");
        assert!(failure.message.starts_with("c.toml: ram: invalid value 'lots'"), "{failure}");
    }
}
