//! Reading the configuration: file, then environment, then flags; what comes later wins.
//!
//! Every value that is given is checked where it is given, so that an error names its place: file with line and column, the
//! environment variable, or the flag. The keys and their types are those of [`Config`], which is their only definition.

mod file;
mod keys;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use figment::providers::Serialized;
use figment::value::{Dict, Map};
use figment::{Figment, Metadata, Profile, Provider};
use hotset_core::config::Config;
use serde::{Deserialize, Serialize};

use keys::{Keys, Known};

/// Prefix of the environment variables that set values: `HOTSET_RAM__BUDGET` is `ram.budget`.
const ENV_PREFIX: &str = "HOTSET_";
/// Parts a section from its key in the name of an environment variable, since keys have single underscores.
const ENV_SEPARATOR: &str = "__";
/// Names the configuration file.
const ENV_FILE: &str = "HOTSET_CONFIG";

/// Where the configuration comes from, beside the environment.
#[derive(Debug, Clone, Default)]
pub struct ConfigSources {
    /// The file. Where none is named: `$HOTSET_CONFIG`, `$XDG_CONFIG_HOME/hotset/hotset.toml`,
    /// `/etc/hotset/hotset.toml`, whichever comes first; where there is none either, the defaults.
    pub file: Option<PathBuf>,
    /// Keys with dots and their values, as the flag `--set` takes them: `("ram.budget", "16GiB")`.
    pub overrides: Vec<(String, String)>,
}

/// A configuration, and where it comes from.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Loaded {
    /// The configuration, checked.
    pub config: Config,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// The place of each value that was given; all others have their defaults.
    pub origins: BTreeMap<String, Origin>,
}

/// The place where a value was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Origin {
    /// The configuration file.
    File {
        /// Which.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Counted from 1, in characters.
        column: usize,
    },
    /// An environment variable.
    Environment {
        /// Its name.
        variable: String,
    },
    /// A flag of the command.
    Flag {
        /// As it was written.
        flag: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, column } => {
                write!(f, "{}:{line}:{column}", path.display())
            }
            Self::Environment { variable } => write!(f, "environment variable {variable}"),
            Self::Flag { flag } => f.write_str(flag),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {} ({named_by}): {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Who named it.
        named_by: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{origin}: this is not TOML: {reason}")]
    Syntax {
        /// Where it stops being TOML.
        origin: Origin,
        /// What is wrong.
        reason: String,
    },
    /// There is no such key.
    #[error("{origin}: there is no key `{key}`{}", did_you_mean(nearest.as_deref()))]
    UnknownKey {
        /// Where it was given.
        origin: Origin,
        /// What was written.
        key: String,
        /// The key that is most like it, where one is.
        nearest: Option<String>,
    },
    /// The value does not suit the key.
    #[error("{origin}: wrong value for `{key}`: {reason}")]
    WrongValue {
        /// Where it was given.
        origin: Origin,
        /// The key.
        key: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The values do not go together.
    #[error("{}wrong value for `{key}`: {reason}", prefix(origin.as_ref()))]
    Unusable {
        /// Where the key was given; `None` where it has its default.
        origin: Option<Origin>,
        /// The key.
        key: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map_or_else(
        || "; `hotset config` lists all keys".into(),
        |key| format!("; did you mean `{key}`?"),
    )
}

fn prefix(origin: Option<&Origin>) -> String {
    origin.map_or_else(String::new, |origin| format!("{origin}: "))
}

/// One value and its place: the unit that figment layers.
#[derive(Debug, Clone)]
struct Given {
    key: String,
    value: toml::Value,
    origin: Origin,
}

impl Provider for Given {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.to_string())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Serialized::default(&self.key, &self.value).data()
    }
}

/// Reads the configuration from file, environment and flags, and checks it.
///
/// # Errors
/// [`ConfigError`], with the place of what is wrong.
pub fn load_config(sources: &ConfigSources) -> Result<Loaded, ConfigError> {
    load_with(sources, env::vars_os())
}

fn load_with(
    sources: &ConfigSources,
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Loaded, ConfigError> {
    let keys = Keys::new();
    // Variables that are not UTF-8 cannot be ours; their neighbours may be.
    let environment: BTreeMap<String, String> = environment
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let mut given = Vec::new();
    let file = find_file(sources, &environment)?;
    if let Some((path, text)) = &file {
        given.extend(file::read(&keys, path, text)?);
    }
    given.extend(from_environment(&keys, &environment)?);
    for (key, value) in &sources.overrides {
        let origin = Origin::Flag {
            flag: format!("--set {key}={value}"),
        };
        given.push(from_text(&keys, key, value, origin)?);
    }

    let mut figment = Figment::new();
    let mut origins = BTreeMap::new();
    for given in given {
        origins.insert(given.key.clone(), given.origin.clone());
        figment = figment.merge(given);
    }
    let config = build(&figment, &origins)?;
    config.validate().map_err(|invalid| ConfigError::Unusable {
        origin: origins.get(&invalid.key).cloned(),
        key: invalid.key,
        reason: invalid.reason,
    })?;
    Ok(Loaded {
        config,
        file: file.map(|(path, _)| path),
        origins,
    })
}

/// The file to read, with its text.
fn find_file(
    sources: &ConfigSources,
    environment: &BTreeMap<String, String>,
) -> Result<Option<(PathBuf, String)>, ConfigError> {
    let read = |path: PathBuf, named_by| match std::fs::read_to_string(&path) {
        Ok(text) => Ok((path, text)),
        Err(source) => Err(ConfigError::Read {
            path,
            named_by,
            source,
        }),
    };
    if let Some(path) = &sources.file {
        return read(path.clone(), "named by --config").map(Some);
    }
    let set = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    if let Some(path) = set(ENV_FILE) {
        return read(path.into(), "named by $HOTSET_CONFIG").map(Some);
    }
    let user = set("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|home| Path::new(home).join(".config")));
    let places = user
        .into_iter()
        .chain([PathBuf::from("/etc")])
        .map(|folder| folder.join("hotset/hotset.toml"));
    for path in places {
        match read(path, "a standard place") {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            found => return found.map(Some),
        }
    }
    Ok(None)
}

/// The values in environment variables. A variable with our prefix but without the separator may belong to somebody else
/// (an orchestrator that names services so), unless it is plainly a misspelt key.
fn from_environment(
    keys: &Keys,
    environment: &BTreeMap<String, String>,
) -> Result<Vec<Given>, ConfigError> {
    let mut given = Vec::new();
    for (variable, value) in environment {
        let Some(name) = variable.strip_prefix(ENV_PREFIX) else {
            continue;
        };
        let origin = Origin::Environment {
            variable: variable.clone(),
        };
        if name.contains(ENV_SEPARATOR) {
            let key = name.to_lowercase().replace(ENV_SEPARATOR, ".");
            given.push(from_text(keys, &key, value, origin)?);
        } else if let Some(key) = keys.spelt_alike(name) {
            return Err(ConfigError::UnknownKey {
                origin,
                key: variable.clone(),
                nearest: Some(format!(
                    "{ENV_PREFIX}{}",
                    key.to_uppercase().replace('.', ENV_SEPARATOR)
                )),
            });
        }
    }
    Ok(given)
}

/// A value that is written as plain text: what reads as TOML is taken so, everything else is a string. A list may also be
/// written with colons, as in `$PATH`.
fn from_text(keys: &Keys, key: &str, text: &str, origin: Origin) -> Result<Given, ConfigError> {
    // `gpu[0].budget` is how messages elsewhere write it.
    let key = key.replace('[', ".").replace(']', "");
    let default = match keys.find(&key) {
        Some(Known::Value(default)) => default,
        Some(Known::Section) => {
            return Err(ConfigError::WrongValue {
                origin,
                reason: format!("it is a section; set one of its keys, such as {key}.KEY"),
                key,
            });
        }
        None => {
            return Err(ConfigError::UnknownKey {
                origin,
                nearest: keys.nearest(&key),
                key,
            });
        }
    };
    let text = text.trim();
    let value = match text.parse::<toml::Value>() {
        Ok(value) if value.is_array() || !default.is_array() => value,
        _ if default.is_array() => toml::Value::Array(
            text.split(':')
                .filter(|part| !part.is_empty())
                .map(|part| toml::Value::String(part.to_owned()))
                .collect(),
        ),
        _ => toml::Value::String(text.to_owned()),
    };
    checked(key, value, default, origin)
}

/// The value, if the key takes it.
fn checked(
    key: String,
    value: toml::Value,
    default: &serde_json::Value,
    origin: Origin,
) -> Result<Given, ConfigError> {
    match Config::deserialize(keys::alone(&key, value.clone())) {
        Ok(_) => Ok(Given { key, value, origin }),
        Err(error) => Err(ConfigError::WrongValue {
            origin,
            reason: match default {
                serde_json::Value::Null | serde_json::Value::Array(_) => error.message().to_owned(),
                default => format!(
                    "{}{}; the default is {default}",
                    error.message(),
                    nearest_variant(error.message(), &value)
                ),
            },
            key,
        }),
    }
}

/// Where a name was not among the allowed ones: the allowed one that is most like it.
fn nearest_variant(message: &str, value: &toml::Value) -> String {
    let (Some(wrong), Some((_, allowed))) = (value.as_str(), message.split_once("expected")) else {
        return String::new();
    };
    allowed
        .split('`')
        // Every second piece is between backticks.
        .skip(1)
        .step_by(2)
        .map(|name| (strsim::damerau_levenshtein(name, wrong), name))
        .min()
        .filter(|(slips, name)| slips * 2 <= name.len())
        .map_or_else(String::new, |(_, name)| format!("; did you mean `{name}`?"))
}

/// The values that won, as a configuration.
fn build(figment: &Figment, origins: &BTreeMap<String, Origin>) -> Result<Config, ConfigError> {
    let unusable = |key: &str, reason: String| ConfigError::Unusable {
        origin: origins
            .iter()
            .find(|(given, _)| given.starts_with(key))
            .map(|(_, origin)| origin.clone()),
        key: key.to_owned(),
        reason,
    };
    let mut table: toml::Table = figment
        .extract()
        .map_err(|error| unusable(&error.path.join("."), error.kind.to_string()))?;
    for key in keys::LISTS {
        let Some(toml::Value::Table(mut sections)) = table.remove(key) else {
            continue;
        };
        let mut list = Vec::new();
        while let Some(section) = sections.remove(&list.len().to_string()) {
            list.push(section);
        }
        if let Some(index) = sections.keys().next() {
            let what = if key == "gpu" { "GPUs" } else { "sets" };
            return Err(unusable(
                &format!("{key}.{index}"),
                format!(
                    "{what} are counted from 0 without gaps; the next one is {key}.{}",
                    list.len()
                ),
            ));
        }
        table.insert(key.into(), toml::Value::Array(list));
    }
    Config::deserialize(toml::Value::Table(table))
        .map_err(|error| unusable("", error.message().to_owned()))
}

impl Loaded {
    /// All keys in force with their values, in the order of their names. Keys of GPUs that are not configured are left out.
    #[must_use]
    pub fn settings(&self) -> Vec<(String, serde_json::Value, Option<&Origin>)> {
        keys::flatten(&self.config)
            .into_iter()
            .map(|(key, value)| {
                let origin = self.origins.get(&key);
                (key, value, origin)
            })
            .collect()
    }
}
