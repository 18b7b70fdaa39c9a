//! The configuration file: TOML, with the place of every key and value.

use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{Keys, Known, LISTS};
use super::{ConfigError, Given, Origin, checked};

/// The keys that hold one path.
const SINGLE_PATHS: [&str; 4] = [
    "catalog.database",
    "predict.folder",
    "bridge.socket",
    "monitor.decisions_file",
];

/// The values of a file, each checked. Relative paths are those beside the file.
pub(super) fn read(keys: &Keys, path: &Path, text: &str) -> Result<Vec<Given>, ConfigError> {
    let reader = Reader { keys, path, text };
    let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        origin: reader.at(error.span().unwrap_or_default()),
        reason: error.message().to_owned(),
    })?;
    let mut given = Vec::new();
    reader.table(document.get_ref(), "", &mut given)?;
    Ok(given)
}

struct Reader<'a> {
    keys: &'a Keys,
    path: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn at(&self, span: Range<usize>) -> Origin {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Origin::File {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    fn table(
        &self,
        table: &DeTable<'_>,
        at: &str,
        given: &mut Vec<Given>,
    ) -> Result<(), ConfigError> {
        for (name, value) in table {
            let dot = if at.is_empty() { "" } else { "." };
            let key = format!("{at}{dot}{}", name.get_ref());
            match self.keys.find(&key) {
                None => {
                    return Err(ConfigError::UnknownKey {
                        origin: self.at(name.span()),
                        nearest: self.keys.nearest(&key),
                        key,
                    });
                }
                Some(Known::Section) => self.section(value, &key, given)?,
                Some(Known::Value(default)) => {
                    let value = self.value(value, &key)?;
                    let value = self.beside_the_file(&key, value, default);
                    given.push(checked(key, value, default, self.at(name.span()))?);
                }
            }
        }
        Ok(())
    }

    fn section(
        &self,
        value: &Spanned<DeValue<'_>>,
        key: &str,
        given: &mut Vec<Given>,
    ) -> Result<(), ConfigError> {
        match value.get_ref() {
            DeValue::Table(table) if !LISTS.contains(&key) => self.table(table, key, given),
            DeValue::Array(list) if LISTS.contains(&key) => {
                for (i, section) in list.iter().enumerate() {
                    let key = format!("{key}.{i}");
                    match section.get_ref() {
                        DeValue::Table(table) => {
                            // A section without a key is one with all defaults.
                            given.push(self.present(&key, section.span()));
                            self.table(table, &key, given)?;
                        }
                        other => return Err(self.no_section(section.span(), &key, other)),
                    }
                }
                Ok(())
            }
            other => Err(self.no_section(value.span(), key, other)),
        }
    }

    fn present(&self, key: &str, span: Range<usize>) -> Given {
        Given {
            key: key.to_owned(),
            value: toml::Value::Table(toml::Table::new()),
            origin: self.at(span),
        }
    }

    fn no_section(&self, span: Range<usize>, key: &str, found: &DeValue<'_>) -> ConfigError {
        let wanted = if key == "gpu" {
            "one [[gpu]] section for each GPU".to_owned()
        } else if LISTS.contains(&key) {
            format!("one [[{key}]] section for each {key}")
        } else {
            format!("a section, [{key}]")
        };
        ConfigError::WrongValue {
            origin: self.at(span),
            key: key.to_owned(),
            reason: format!("it is {wanted}, not a {}", found.type_str()),
        }
    }

    fn value(&self, value: &Spanned<DeValue<'_>>, key: &str) -> Result<toml::Value, ConfigError> {
        let source = &self.text[value.span()];
        toml::Value::deserialize(toml::de::ValueDeserializer::parse(source).map_err(|error| {
            ConfigError::WrongValue {
                origin: self.at(value.span()),
                key: key.to_owned(),
                reason: error.message().to_owned(),
            }
        })?)
        .map_err(|error| ConfigError::WrongValue {
            origin: self.at(value.span()),
            key: key.to_owned(),
            reason: error.message().to_owned(),
        })
    }

    /// Paths in a file are relative to the file. All lists of the configuration are lists of paths, but for those of sets.
    fn beside_the_file(
        &self,
        key: &str,
        value: toml::Value,
        default: &serde_json::Value,
    ) -> toml::Value {
        let home = self.path.parent().map(Path::to_owned).unwrap_or_default();
        let beside = |path: toml::Value| match path {
            toml::Value::String(path) => {
                toml::Value::String(home.join(path).to_string_lossy().into_owned())
            }
            other => other,
        };
        match value {
            toml::Value::Array(paths) if default.is_array() && !key.starts_with("set.") => {
                toml::Value::Array(paths.into_iter().map(beside).collect())
            }
            path if SINGLE_PATHS.contains(&key) => beside(path),
            other => other,
        }
    }
}
