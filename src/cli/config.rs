//! `hotset config`: what is in force, and where it was said.

use hotset::{Bytes, ConfigSources, Loaded, load_config};
use serde_json::{Value, json};

use super::output::{self, line, table};
use super::{CliError, Global};

/// `hotset config`
pub(crate) fn run(global: &Global) -> Result<(), CliError> {
    let loaded = load_config(&ConfigSources {
        file: global.config.clone(),
        overrides: global.set.clone(),
    })?;
    if global.json {
        return output::json(&document(&loaded));
    }
    match &loaded.file {
        Some(path) => line(format!("file: {}", path.display()))?,
        None => line("file: none; see config/hotset.toml for one with every key")?,
    }
    let mut rows = table(&["key", "value", "from"], &[]);
    for (key, value, origin) in loaded.settings() {
        rows.add_row([
            key.clone(),
            text(&key, &value),
            origin.map_or_else(|| "default".to_owned(), ToString::to_string),
        ]);
    }
    line(rows.to_string())
}

fn document(loaded: &Loaded) -> Value {
    let settings: Vec<Value> = loaded
        .settings()
        .into_iter()
        .map(|(key, value, origin)| json!({ "key": key, "value": value, "origin": origin }))
        .collect();
    json!({ "file": loaded.file, "settings": settings })
}

/// The keys whose values are bytes, by their last part.
const SIZES: [&str; 7] = [
    "budget",
    "headroom",
    "memory",
    "granularity",
    "bandwidth",
    "piece",
    "ring",
];

fn text(key: &str, value: &Value) -> String {
    let name = key.rsplit('.').next().unwrap_or(key);
    match value {
        Value::Null => "not set".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if SIZES.contains(&name) => number
            .as_u64()
            .map_or_else(|| number.to_string(), |bytes| Bytes(bytes).to_string()),
        other => other.to_string(),
    }
}
