//! Decisions in a file, a line of JSON each, for whoever wants to know later than the log in memory remembers.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::json;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use crate::Decision;

/// Opens the file for appending; makes it where there is none.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Writes what comes until nobody decides any more, on a thread of its own: a slow disk keeps nobody waiting. What it is too
/// slow for is counted in the file.
pub(crate) fn start(file: File, decisions: Receiver<Decision>) -> io::Result<()> {
    std::thread::Builder::new()
        .name("hotset-decisions".into())
        .spawn(move || {
            if let Err(error) = write_all(BufWriter::new(file), decisions) {
                tracing::error!(%error, "decisions are no longer written; see monitor.decisions_file");
            }
        })?;
    Ok(())
}

fn write_all(mut to: impl Write, mut decisions: Receiver<Decision>) -> io::Result<()> {
    loop {
        let next = match decisions.try_recv() {
            Ok(decision) => Ok(decision),
            Err(TryRecvError::Lagged(lost)) => Err(RecvError::Lagged(lost)),
            Err(TryRecvError::Closed) => Err(RecvError::Closed),
            Err(TryRecvError::Empty) => {
                // Whoever reads the file sees all of it while nothing happens.
                to.flush()?;
                decisions.blocking_recv()
            }
        };
        match next {
            Ok(decision) => serde_json::to_writer(&mut to, &decision)?,
            Err(RecvError::Lagged(lost)) => serde_json::to_writer(&mut to, &json!({"lost": lost}))?,
            Err(RecvError::Closed) => return to.flush(),
        }
        to.write_all(b"\n")?;
    }
}
