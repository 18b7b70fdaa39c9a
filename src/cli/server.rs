//! The running server, where there is one: most commands ask it instead of starting a system of their own.

use hotset::Config;
use hotset::bridge::default_socket;
use hotset::client::{Client, ClientError};

use super::{CliError, Global};

/// A connection to the running server. `None` where none answers, or the command is about a system of its own: `--alone`, or other
/// folders than the configuration's (`--models`).
pub(crate) async fn connect(config: &Config, global: &Global) -> Result<Option<Client>, CliError> {
    if global.alone || !global.models.is_empty() || !config.bridge.enabled {
        return Ok(None);
    }
    let Some(path) = config.bridge.socket.clone().or_else(default_socket) else {
        return Ok(None);
    };
    match Client::connect_to(&path, "hotset command").await {
        Ok(client) => Ok(Some(client)),
        Err(ClientError::Connect { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The same, where nothing else will do.
pub(crate) async fn required(global: &Global) -> Result<Client, CliError> {
    let config = super::config(global)?;
    let path = config.bridge.socket.clone().or_else(default_socket);
    let path = path.ok_or(ClientError::NoPlace)?;
    Ok(Client::connect_to(&path, "hotset command").await?)
}
