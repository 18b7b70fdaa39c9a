//! Tables that fit the terminal, JSON documents, progress bars.

use std::collections::HashMap;
use std::io::{BufWriter, IsTerminal, Write};
use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Attribute, Cell, CellAlignment, ContentArrangement, Table};
use hotset::Bytes;
use hotset::bridge::wire::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::CliError;

/// Width of a table that goes into a file or a pipe.
const PIPED_WIDTH: u16 = 120;

/// Writes a line to standard output.
pub(crate) fn line(text: impl AsRef<str>) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", text.as_ref()).map_err(CliError::Output)
}

/// Writes a line to stderr. Where nobody can read it any more, since a terminal was closed or a reader has gone, nothing ends for
/// that.
pub(crate) fn tell(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Tells on stderr what a long command is at, where somebody sees it.
pub(crate) fn note(global: &super::Global, text: String) {
    if !global.json && std::io::stderr().is_terminal() {
        tell(text);
    }
}

/// Writes the one JSON document of a command.
pub(crate) fn json(value: &impl Serialize) -> Result<(), CliError> {
    // Standard output flushes at each line by itself, which for a large library is a million writes.
    let mut out = BufWriter::new(std::io::stdout().lock());
    serde_json::to_writer_pretty(&mut out, value)
        .map_err(|error| CliError::Output(error.into()))?;
    writeln!(out)
        .and_then(|()| out.flush())
        .map_err(CliError::Output)
}

/// The part of a document that a table shows.
pub(crate) fn view<T: DeserializeOwned>(document: Value) -> Result<T, CliError> {
    serde_json::from_value(document).map_err(CliError::Answer)
}

/// A table with these columns; those named in `right` are aligned to the right.
pub(crate) fn table(columns: &[&str], right: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic);
    let tty = std::io::stdout().is_terminal();
    if !tty || std::env::var_os("NO_COLOR").is_some() {
        table.force_no_tty();
    }
    if !tty {
        table.set_width(PIPED_WIDTH);
    }
    table.set_header(
        columns
            .iter()
            .map(|name| Cell::new(name).add_attribute(Attribute::Bold)),
    );
    for (i, name) in columns.iter().enumerate() {
        if right.contains(name)
            && let Some(column) = table.column_mut(i)
        {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A share of the whole as a bar of blocks, for tables.
pub(crate) fn gauge(part: Bytes, whole: Bytes, width: usize) -> String {
    let share = part.as_f64() / whole.as_f64().max(1.0);
    let full = (share * width as f64).round().clamp(0.0, width as f64) as usize;
    format!(
        "{}{} {:>3.0}%",
        "█".repeat(full),
        "░".repeat(width - full),
        share * 100.0
    )
}

/// Progress bars of a load: one for each component. Drawn on stderr, and not at all where that is no terminal.
pub(crate) struct Bars {
    all: MultiProgress,
    of: HashMap<String, ProgressBar>,
}

/// Redraws each second: enough for the eye, and cheap over ssh.
const REDRAWS: u8 = 15;

impl Bars {
    /// Bars; `hidden` where only the result counts.
    pub(crate) fn new(hidden: bool) -> Self {
        let target = if hidden {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr_with_hz(REDRAWS)
        };
        Self {
            all: MultiProgress::with_draw_target(target),
            of: HashMap::new(),
        }
    }

    /// Shows this progress.
    pub(crate) fn show(&mut self, progress: &Progress) {
        let width = progress
            .components
            .iter()
            .map(|c| c.component.chars().count())
            .max()
            .unwrap_or(0);
        for component in &progress.components {
            let all = &self.all;
            let bar = self
                .of
                .entry(component.component.clone())
                .or_insert_with(|| {
                    let bar = all.add(ProgressBar::new(component.total));
                    bar.set_style(style());
                    bar.set_prefix(format!("{:width$}", component.component));
                    bar
                });
            bar.set_position(component.done);
            match component.phase.as_str() {
                "loading" => bar.set_message(eta(progress)),
                "ready" if component.shared => bar.finish_with_message("already there"),
                "ready" => bar.finish_with_message("ready"),
                _ => bar.set_message("waiting"),
            }
        }
    }

    /// Leaves the bars as they are and lets the terminal go on below.
    pub(crate) fn finish(self) {
        for bar in self.of.values() {
            if !bar.is_finished() {
                bar.abandon();
            }
        }
    }
}

fn eta(progress: &Progress) -> String {
    match progress.eta_s {
        Some(seconds) => format!(
            "{}/s, {:.0?} left",
            Bytes(progress.bytes_per_s as u64),
            Duration::from_secs_f64(seconds.min(1e6))
        ),
        None => "loading".into(),
    }
}

fn style() -> ProgressStyle {
    // The template is a constant, and right.
    ProgressStyle::with_template(
        "  {prefix} {bar:32.cyan/dim} {binary_bytes:>10}/{binary_total_bytes:<10} {msg}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
    .progress_chars("━╸─")
}
