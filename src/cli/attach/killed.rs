//! How long it takes until the leases of a killed client are back.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hotset::Hotset;
use hotset::client::{Client, LoadOptions};

use super::{AttachArgs, Times, attach, name, times};
use crate::cli::CliError;

/// Clients that are killed.
const KILLED: usize = 20;
/// Longer than any of it takes, where it works.
const PATIENCE: Duration = Duration::from_secs(30);

/// As the client: leases the set, maps it, says so, and waits to be killed.
pub(super) async fn hold(args: &AttachArgs, socket: &Path) -> Result<(), CliError> {
    let client = Client::connect_to(socket, "to be killed").await?;
    let set = LoadOptions::new((0..args.components).map(name)).on(args.tier.to_string());
    let leases = client.load(&set).await?;
    if args.tier == hotset::Tier::Ram {
        attach(&leases, None)?;
    }
    super::output::line("held")?;
    std::future::pending().await
}

/// As the server: starts such clients, kills each with SIGKILL, and waits for its leases.
pub(super) async fn measure(
    args: &AttachArgs,
    hotset: &Hotset,
    socket: &Path,
) -> Result<Times, CliError> {
    let program = std::env::current_exe().map_err(CliError::Output)?;
    let leases = || hotset.ledger().leases().values().sum::<usize>();
    let before = leases();
    let mut seconds = Vec::with_capacity(KILLED);
    for _ in 0..KILLED {
        let mut child = std::process::Command::new(&program)
            .args(["bench", "attach", "--hold", "--against"])
            .arg(socket)
            .args(["--tier", &args.tier.to_string()])
            .args(["--components", &args.components.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(CliError::Output)?;
        let said = child.stdout.take();
        let held = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            let mut said = said.map(BufReader::new);
            said.as_mut().map(|said| said.read_line(&mut line));
            line.trim() == "held"
        });
        let held = held.await.unwrap_or(false) && leases() > before;
        let began = Instant::now();
        child.kill().map_err(CliError::Output)?;
        while leases() > before && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        let took = began.elapsed();
        let _ = tokio::task::spawn_blocking(move || child.wait()).await;
        if !held || took >= PATIENCE {
            return Err(CliError::Usage(
                "a client that was to be killed held nothing, or its leases did not come back"
                    .into(),
            ));
        }
        seconds.push(took.as_secs_f64());
    }
    Ok(times(seconds))
}
