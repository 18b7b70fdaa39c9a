#![allow(missing_docs)]
use std::path::PathBuf;
pub struct ConfigSources {
    pub file: Option<PathBuf>,
    pub overrides: Vec<(String, String)>,
}
pub struct Loaded {
    pub config: crate::Config,
}
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct ConfigError;
pub fn load_config(_s: &ConfigSources) -> Result<Loaded, ConfigError> {
    Ok(Loaded {
        config: Default::default(),
    })
}
