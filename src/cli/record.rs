//! `hotset record`: what a running server grants, as a trace for `hotset replay`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use hotset::bridge::wire::{GrantedComponent, GrantedEvent, ServerMessage};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::output::{self, line};
use super::serve::Stop;
use super::{CliError, Global, server};

/// Where to write, and what.
#[derive(Debug, Args)]
pub(crate) struct RecordArgs {
    /// A new file for the requests: t_s, session and components
    requests: PathBuf,
    /// A new file for the components in them: id, kind and bytes
    #[arg(long, value_name = "FILE")]
    components: PathBuf,
    /// Write numbers in place of the names of components and sessions; kinds and bytes stay
    #[arg(long)]
    anonymise: bool,
    /// End after this time [default: with ctrl-c, or the server]
    #[arg(long = "for", value_parser = humantime::parse_duration, value_name = "DURATION")]
    time: Option<Duration>,
}

/// `hotset record REQUESTS --components FILE`
pub(crate) async fn run(args: &RecordArgs, global: &Global) -> Result<(), CliError> {
    let client = server::required(global).await?;
    let mut recording = Recording::new(
        create(&args.requests)?,
        create(&args.components)?,
        args.anonymise,
    );
    let failed = |source| CliError::File {
        path: args.requests.clone(),
        source,
    };
    recording.begin().map_err(failed)?;
    let mut events = client.events();
    client.subscribe(&["granted"]).await?;
    if !global.json {
        line(format!(
            "recording to {}; ctrl-c ends it",
            args.requests.display()
        ))?;
    }
    let mut stop = Stop::listen()?;
    let end = async {
        match args.time {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(end);
    loop {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Ok(ServerMessage::Granted(granted)) => recording.note(&granted).map_err(failed)?,
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => recording.missed += missed,
                Err(RecvError::Closed) => break,
            },
            _ = client.closed() => break,
            _ = stop.told() => break,
            () = &mut end => break,
        }
    }
    recording.end().map_err(failed)?;
    let (requests, components, missed) =
        (recording.requests, recording.ids.len(), recording.missed);
    if global.json {
        return output::json(&json!({
            "requests": requests,
            "components": components,
            "missed": missed,
        }));
    }
    let lost = match missed {
        0 => String::new(),
        missed => format!("; {missed} came too fast and are missing"),
    };
    line(format!(
        "{requests} requests for {components} components{lost}; try: hotset replay {} --components {}",
        args.requests.display(),
        args.components.display()
    ))
}

fn create(path: &Path) -> Result<BufWriter<File>, CliError> {
    // What was recorded before is not written over.
    let file = File::create_new(path).map_err(|source| CliError::File {
        path: path.to_owned(),
        source,
    })?;
    Ok(BufWriter::new(file))
}

/// A recording under way.
struct Recording<W> {
    to_requests: W,
    to_components: W,
    anonymous: bool,
    /// Ids in the tables by content: equal bytes are one component, whatever their names.
    ids: HashMap<String, String>,
    sessions: HashMap<u64, usize>,
    /// When the first request was, by the server's clock.
    first_s: Option<f64>,
    last_s: f64,
    requests: u64,
    missed: u64,
}

impl<W: Write> Recording<W> {
    fn new(to_requests: W, to_components: W, anonymous: bool) -> Self {
        Self {
            to_requests,
            to_components,
            anonymous,
            ids: HashMap::new(),
            sessions: HashMap::new(),
            first_s: None,
            last_s: 0.0,
            requests: 0,
            missed: 0,
        }
    }

    fn begin(&mut self) -> io::Result<()> {
        writeln!(self.to_requests, "t_s,session,components")?;
        writeln!(self.to_components, "id,kind,bytes")
    }

    fn note(&mut self, granted: &GrantedEvent) -> io::Result<()> {
        self.missed += granted.missed;
        if granted.components.is_empty() {
            return Ok(());
        }
        let mut ids: Vec<String> = Vec::with_capacity(granted.components.len());
        for component in &granted.components {
            let id = self.id(component)?;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        let first_s = *self.first_s.get_or_insert(granted.at_s);
        // A table of requests never goes back in time.
        self.last_s = self.last_s.max(granted.at_s - first_s);
        let count = self.sessions.len();
        let session = *self.sessions.entry(granted.session).or_insert(count);
        let session = if self.anonymous {
            session as u64
        } else {
            granted.session
        };
        let components = ids.join("|");
        writeln!(
            self.to_requests,
            "{:.3},S{session:04},{components}",
            self.last_s
        )?;
        self.requests += 1;
        // Whoever looks at the files meanwhile sees what there is.
        self.to_requests.flush()
    }

    fn id(&mut self, component: &GrantedComponent) -> io::Result<String> {
        if let Some(id) = self.ids.get(&component.content) {
            return Ok(id.clone());
        }
        let mut id = if self.anonymous {
            format!("C{:04}", self.ids.len())
        } else {
            component
                .component
                .replace([',', '|', '"', '\n', '\r'], "_")
        };
        // Another version of a file has the name of the first.
        while self.ids.values().any(|other| *other == id) {
            id.push('+');
        }
        writeln!(
            self.to_components,
            "{id},{},{}",
            component.kind, component.bytes
        )?;
        self.to_components.flush()?;
        self.ids.insert(component.content.clone(), id.clone());
        Ok(id)
    }

    fn end(&mut self) -> io::Result<()> {
        self.to_requests.flush()?;
        self.to_components.flush()
    }
}

#[cfg(test)]
mod tests {
    use hotset::core::replay::Trace;

    use super::*;

    fn component(name: &str, content: &str) -> GrantedComponent {
        GrantedComponent {
            component: name.into(),
            content: content.into(),
            kind: "vae".into(),
            bytes: 7,
        }
    }

    fn recorded(anonymous: bool) -> (String, String, u64) {
        let mut recording = Recording::new(Vec::new(), Vec::new(), anonymous);
        recording.begin().unwrap();
        let sets = [
            vec![component("a,b/vae", "1"), component("other/vae", "1")],
            vec![component("a,b/vae", "2"), component("c/unet", "3")],
            vec![],
        ];
        for (number, components) in (0_u32..).zip(sets) {
            recording
                .note(&GrantedEvent {
                    at_s: 100.0 + f64::from(number),
                    session: 41 + u64::from(number),
                    missed: u64::from(number),
                    components,
                })
                .unwrap();
        }
        recording.end().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let missed = recording.missed;
        (
            text(recording.to_requests),
            text(recording.to_components),
            missed,
        )
    }

    #[test]
    fn what_is_recorded_can_be_replayed() {
        let (requests, components, missed) = recorded(false);
        assert_eq!(missed, 3);
        let trace = Trace::parse(&requests, &components).unwrap();
        assert_eq!((trace.requests().len(), trace.components().len()), (2, 3));
        assert!(
            requests.contains("1.000,S0042,a_b/vae+|c/unet"),
            "{requests}"
        );
    }

    #[test]
    fn no_name_is_in_an_anonymous_recording() {
        let (requests, components, _) = recorded(true);
        assert!(Trace::parse(&requests, &components).is_ok());
        assert_eq!(
            requests,
            "t_s,session,components\n0.000,S0000,C0000\n1.000,S0001,C0001|C0002\n"
        );
        for name in ["vae/", "/vae", "unet", "S0041"] {
            assert!(!requests.contains(name) && !components.contains(name));
        }
    }
}
