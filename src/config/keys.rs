//! The keys of the configuration, as the type [`Config`] itself states them.

use hotset_core::config::{Config, GpuConfig, QuotaConfig, SetConfig};
use serde_json::Value;

/// The keys that hold lists of sections.
pub(super) const LISTS: [&str; 3] = ["gpu", "quota", "set"];

/// All keys with their defaults; lists hold one section, which stands for each.
pub(super) struct Keys {
    tree: Value,
}

/// What a key is.
pub(super) enum Known<'a> {
    /// A section: it has keys of its own.
    Section,
    /// A value, with its default.
    Value(&'a Value),
}

/// Likeness from 0 to 1 above which a key is worth suggesting: two letters swapped or missing are, another word is not.
const ALIKE: f64 = 0.8;

impl Keys {
    pub(super) fn new() -> Self {
        let config = Config {
            gpu: vec![GpuConfig::default()],
            quota: vec![QuotaConfig::default()],
            set: vec![SetConfig::default()],
            ..Config::default()
        };
        Self {
            tree: tree(&config),
        }
    }

    /// What is known of a key with dots. The index of a section may be any number.
    pub(super) fn find(&self, key: &str) -> Option<Known<'_>> {
        let mut node = &self.tree;
        for part in key.split('.') {
            node = match node {
                Value::Object(section) => section.get(part)?,
                Value::Array(list) if part.parse::<u32>().is_ok() => list.first()?,
                _ => return None,
            };
        }
        Some(match node {
            Value::Object(_) => Known::Section,
            // A list of sections, unlike a list of values, which is empty by default.
            Value::Array(list) if list.first().is_some_and(Value::is_object) => Known::Section,
            value => Known::Value(value),
        })
    }

    /// The key that is most like a wrong one.
    pub(super) fn nearest(&self, wrong: &str) -> Option<String> {
        // The index that was written is kept.
        let index = wrong
            .split('.')
            .nth(1)
            .filter(|part| part.parse::<u32>().is_ok());
        let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        self.all(index.unwrap_or("0"))
            .into_iter()
            .map(|key| {
                let whole = strsim::normalized_damerau_levenshtein(&key, wrong);
                // The right name in the wrong section, or nearly.
                let name = strsim::normalized_damerau_levenshtein(&last(&key), &last(wrong));
                // Short words are unlike by the share of their letters, but one slip of the fingers is one.
                let slip = strsim::damerau_levenshtein(&key, wrong) == 1;
                let likeness = whole.max(name * 0.95);
                (if slip { likeness.max(ALIKE) } else { likeness }, key)
            })
            .filter(|(likeness, _)| *likeness >= ALIKE)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .or_else(|| self.same_section(wrong))
            .map(|(_, key)| key)
    }

    /// For a wrong name in a right section, the most alike of that section, with less likeness asked for.
    fn same_section(&self, wrong: &str) -> Option<(f64, String)> {
        let (section, name) = wrong.rsplit_once('.')?;
        self.all("0")
            .into_iter()
            .filter_map(|key| {
                let (home, candidate) = key.rsplit_once('.')?;
                let likeness = strsim::jaro_winkler(candidate, name);
                (home == section && likeness >= ALIKE).then_some((likeness, key.clone()))
            })
            .max_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// The key that a variable's name spells, were it not for its underscores.
    pub(super) fn spelt_alike(&self, name: &str) -> Option<String> {
        let plain = |text: &str| text.to_lowercase().replace(['.', '_'], "");
        let wanted = plain(name);
        self.all("0").into_iter().find(|key| plain(key) == wanted)
    }

    /// All keys and sections, with this index for those in lists.
    fn all(&self, index: &str) -> Vec<String> {
        let mut keys = Vec::new();
        collect(&self.tree, "", &mut |key, _| {
            let listed = LISTS.iter().find_map(|list| {
                let rest = key.strip_prefix(&format!("{list}.0"))?;
                Some(format!("{list}.{index}{rest}"))
            });
            keys.push(listed.unwrap_or_else(|| key.to_owned()));
        });
        keys
    }
}

/// The values of a configuration under their keys.
pub(super) fn flatten(config: &Config) -> Vec<(String, Value)> {
    let mut values = Vec::new();
    collect(&tree(config), "", &mut |key, value| {
        if !value.is_object() {
            values.push((key.to_owned(), value.clone()));
        }
    });
    values
}

fn tree(config: &Config) -> Value {
    // A struct of plain values always serialises; were it not so, every key would be refused by name.
    serde_json::to_value(config).unwrap_or_default()
}

/// Calls `seen` for each key below `node`, sections included.
fn collect(node: &Value, at: &str, seen: &mut impl FnMut(&str, &Value)) {
    let dot = if at.is_empty() { "" } else { "." };
    match node {
        Value::Object(section) => {
            for (name, child) in section {
                let key = format!("{at}{dot}{name}");
                let is_list_of_sections =
                    matches!(child, Value::Array(list) if list.iter().any(Value::is_object));
                if !is_list_of_sections {
                    seen(&key, child);
                }
                collect(child, &key, seen);
            }
        }
        Value::Array(list) if list.iter().any(Value::is_object) => {
            for (i, child) in list.iter().enumerate() {
                let key = format!("{at}{dot}{i}");
                seen(&key, child);
                collect(child, &key, seen);
            }
        }
        _ => {}
    }
}

/// A document that holds this one value.
pub(super) fn alone(key: &str, value: toml::Value) -> toml::Value {
    key.rsplit('.').fold(value, |inner, part| {
        if part.parse::<u32>().is_ok() {
            toml::Value::Array(vec![inner])
        } else {
            toml::Value::Table([(part.to_owned(), inner)].into_iter().collect())
        }
    })
}
