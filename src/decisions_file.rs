//! Decisions in a file, a line of JSON each, for whoever wants to know later than the log in memory remembers.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
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
/// slow for, or has no room for, is counted in the file.
pub(crate) fn start(file: File, decisions: Receiver<Decision>) -> io::Result<()> {
    std::thread::Builder::new()
        .name("hotset-decisions".into())
        .spawn(move || write_all(Lines::new(file), decisions))?;
    Ok(())
}

/// Lines on their way to the file. One that could not be written whole is counted, and begun anew.
struct Lines<W> {
    to: W,
    waiting: Vec<u8>,
    /// Lines in `waiting`.
    lines: u64,
    /// Lines that were not written.
    lost: u64,
    /// The last write ended in the middle of a line, or may have.
    torn: bool,
}

/// Lines are written together while more come.
const TOGETHER: usize = 64 << 10;

impl<W: Write> Lines<W> {
    const fn new(to: W) -> Self {
        Self {
            to,
            waiting: Vec::new(),
            lines: 0,
            lost: 0,
            torn: false,
        }
    }

    fn add(&mut self, line: &impl serde::Serialize) {
        let before = self.waiting.len();
        if serde_json::to_writer(&mut self.waiting, line).is_err() {
            self.waiting.truncate(before);
            self.lost += 1;
            return;
        }
        self.waiting.push(b'\n');
        self.lines += 1;
        if self.waiting.len() >= TOGETHER {
            self.flush();
        }
    }

    /// Writes what waits. What the disk does not take now is lost: the next lines may fare better.
    fn flush(&mut self) {
        let written = self.write();
        if let Err(error) = written {
            if self.lost == 0 {
                tracing::error!(%error, "decisions cannot be written; see monitor.decisions_file");
            }
            self.lost += self.lines;
            self.torn = true;
        }
        self.waiting.clear();
        self.lines = 0;
    }

    fn write(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        if self.torn {
            self.to.write_all(b"\n")?;
            self.torn = false;
        }
        if self.lost > 0 {
            let line = format!("{}\n", json!({"lost": self.lost}));
            self.to.write_all(line.as_bytes())?;
            tracing::info!(lost = self.lost, "decisions are written again");
            self.lost = 0;
        }
        self.to.write_all(&self.waiting)?;
        self.to.flush()
    }
}

fn write_all(mut lines: Lines<impl Write>, mut decisions: Receiver<Decision>) {
    loop {
        let next = match decisions.try_recv() {
            Ok(decision) => Ok(decision),
            Err(TryRecvError::Lagged(lost)) => Err(RecvError::Lagged(lost)),
            Err(TryRecvError::Closed) => Err(RecvError::Closed),
            Err(TryRecvError::Empty) => {
                // Whoever reads the file sees all of it while nothing happens.
                lines.flush();
                decisions.blocking_recv()
            }
        };
        match next {
            Ok(decision) => lines.add(&decision),
            Err(RecvError::Lagged(lost)) => lines.add(&json!({"lost": lost})),
            Err(RecvError::Closed) => return lines.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has room for so many bytes.
    struct Disk {
        written: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= taken;
            self.written.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_disk_that_was_full_for_a_while_gets_what_comes_after() {
        let mut lines = Lines::new(Disk {
            written: Vec::new(),
            room: 30,
        });
        for act in ["first", "second", "third", "fourth"] {
            lines.add(&json!({ "act": act }));
            lines.flush();
        }
        lines.to.room = 1000;
        lines.add(&json!({"act": "fifth"}));
        lines.add(&json!({"act": "sixth"}));
        lines.flush();
        let text = String::from_utf8(lines.to.written).unwrap();
        let whole: Vec<serde_json::Value> = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let expected = [
            json!({"act": "first"}),
            json!({"lost": 3}),
            json!({"act": "fifth"}),
            json!({"act": "sixth"}),
        ];
        assert_eq!(whole, expected, "{text}");
    }
}
