//! When a changed file may be read: debouncing, and waiting until a download is whole. Pure: events and `now` in, paths out.
//!
//! A watcher hands every changed path to [`Settler::changed`] and asks [`Settler::ready`] now and then. A path comes
//! out once it has rested for the settling time and its size has stopped growing.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Suffixes that downloaders give to what is not whole yet.
const PARTIAL_SUFFIXES: [&str; 8] = [
    "part",
    "partial",
    "incomplete",
    "crdownload",
    "aria2",
    "download",
    "tmp",
    "opdownload",
];

/// The most paths that wait at once. Past it, a scan of everything is cheaper and forgets nothing.
const MAX_WAITING: usize = 10_000;

/// Whether a file of this name is a download under way, or the control file of one.
#[must_use]
pub fn is_partial(path: &Path) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|suffix| {
            PARTIAL_SUFFIXES
                .iter()
                .any(|p| suffix.eq_ignore_ascii_case(p))
        })
}

/// The file that a control or partial file belongs to: `x.safetensors` of `x.safetensors.aria2`.
fn whole_of(path: &Path) -> Option<PathBuf> {
    is_partial(path).then(|| path.with_extension(""))
}

/// What to look at now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ready {
    /// Paths that have come to rest.
    pub paths: Vec<PathBuf>,
    /// Whether events were lost, or too many came, so that everything has to be looked at.
    pub everything: bool,
}

impl Ready {
    /// Whether there is nothing to look at.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty() && !self.everything
    }
}

/// Holds changed paths back until they have come to rest.
#[derive(Debug)]
pub struct Settler {
    settle: Duration,
    waiting: BTreeMap<PathBuf, Waiting>,
    everything: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    /// The last event or growth.
    since: Instant,
    /// The size when it was last looked at.
    size: Option<u64>,
}

impl Settler {
    /// A settler that lets a path rest this long.
    #[must_use]
    pub fn new(settle: Duration) -> Self {
        Self {
            settle,
            waiting: BTreeMap::new(),
            everything: None,
        }
    }

    /// A path appeared, changed, moved or went away.
    pub fn changed(&mut self, path: &Path, now: Instant) {
        // The control file going away means that the download is done, so the file itself is due.
        let path = whole_of(path).unwrap_or_else(|| path.to_path_buf());
        if self.everything.is_some() {
            self.everything = Some(now);
            return;
        }
        let size = self.waiting.get(&path).and_then(|w| w.size);
        self.waiting.insert(path, Waiting { since: now, size });
        if self.waiting.len() > MAX_WAITING {
            self.lost(now);
        }
    }

    /// A path was looked at and is not whole: it is due again after `wait`, or when it has changed and come to rest.
    pub fn postponed(&mut self, path: PathBuf, now: Instant, wait: Duration) {
        if self.everything.is_none() {
            self.waiting.entry(path).or_insert(Waiting {
                since: now + wait,
                size: None,
            });
        }
    }

    /// Events were lost, so everything has to be looked at.
    pub fn lost(&mut self, now: Instant) {
        self.waiting.clear();
        self.everything = Some(now);
    }

    /// What has come to rest. `size` gives a file's size now, `None` for what is no file; `exists` tells whether a path is
    /// there, and is asked for the control files of downloads.
    pub fn ready(
        &mut self,
        now: Instant,
        size: impl Fn(&Path) -> Option<u64>,
        exists: impl Fn(&Path) -> bool,
    ) -> Ready {
        let mut ready = Ready::default();
        if let Some(since) = self.everything
            && now.saturating_duration_since(since) >= self.settle
        {
            self.everything = None;
            ready.everything = true;
            return ready;
        }
        let rested: Vec<PathBuf> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| now.saturating_duration_since(waiting.since) >= self.settle)
            .map(|(path, _)| path.clone())
            .collect();
        let mut out = BTreeSet::new();
        for path in rested {
            let Some(waiting) = self.waiting.get_mut(&path) else {
                continue;
            };
            let size_now = size(&path);
            let downloading = PARTIAL_SUFFIXES.iter().any(|suffix| {
                let mut name = path.clone().into_os_string();
                name.push(".");
                name.push(suffix);
                exists(Path::new(&name))
            });
            let grew = waiting.size.is_some() && waiting.size != size_now;
            if downloading || grew {
                *waiting = Waiting {
                    since: now,
                    size: size_now,
                };
                continue;
            }
            self.waiting.remove(&path);
            out.insert(path);
        }
        ready.paths = out.into_iter().collect();
        ready
    }

    /// When something may next come to rest; `None` while nothing waits.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        let first = self.waiting.values().map(|waiting| waiting.since).min();
        let since = match (first, self.everything) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        since.map(|since| since + self.settle)
    }
}

/// How often a folder without events is looked at, and why.
///
/// Network mounts and user-space file systems report no changes made elsewhere. The magic numbers are those of
/// `statfs(2)`.
#[must_use]
pub fn lacks_events(path: &Path) -> Option<&'static str> {
    let statfs = rustix::fs::statfs(path).ok()?;
    // The type is signed on some targets and unsigned on others.
    #[allow(clippy::unnecessary_cast)]
    let magic = statfs.f_type as u64 & 0xffff_ffff;
    match magic {
        0x6969 => Some("NFS"),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => Some("SMB"),
        0x6573_5546 => Some("FUSE"),
        0x0102_1997 => Some("9p"),
        0x00c3_6400 => Some("Ceph"),
        0x5346_414f => Some("AFS"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLE: Duration = Duration::from_millis(500);

    fn ms(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_growing_file_waits_until_it_rests() {
        let start = Instant::now();
        let path = Path::new("/m/x.safetensors");
        let mut settler = Settler::new(SETTLE);
        for at in (0..2000).step_by(100) {
            settler.changed(path, ms(start, at));
            assert!(
                settler
                    .ready(ms(start, at), |_| Some(at), |_| false)
                    .is_empty()
            );
        }
        assert_eq!(settler.next(), Some(ms(start, 2400)));
        let ready = settler.ready(ms(start, 2400), |_| Some(9), |_| false);
        assert_eq!(ready.paths, [path]);
        assert_eq!(settler.next(), None);
    }

    #[test]
    fn a_download_waits_for_its_control_file_to_go() {
        let start = Instant::now();
        let mut settler = Settler::new(SETTLE);
        settler.changed(Path::new("/m/x.gguf"), start);
        let control = Path::new("/m/x.gguf.aria2");
        assert!(
            settler
                .ready(ms(start, 600), |_| Some(1), |p| p == control)
                .is_empty()
        );
        settler.changed(control, ms(start, 700));
        assert!(
            settler
                .ready(ms(start, 1000), |_| Some(1), |_| false)
                .is_empty()
        );
        let ready = settler.ready(ms(start, 1300), |_| Some(1), |_| false);
        assert_eq!(ready.paths, [Path::new("/m/x.gguf")]);
    }

    #[test]
    fn lost_events_mean_that_everything_is_looked_at() {
        let start = Instant::now();
        let mut settler = Settler::new(SETTLE);
        for i in 0..=MAX_WAITING {
            settler.changed(&PathBuf::from(format!("/m/{i}")), start);
        }
        assert!(
            settler
                .ready(ms(start, 499), |_| None, |_| false)
                .is_empty()
        );
        assert!(
            settler
                .ready(ms(start, 500), |_| None, |_| false)
                .everything
        );
        assert!(
            settler
                .ready(ms(start, 9999), |_| None, |_| false)
                .is_empty()
        );
    }
}
