//! How long a component stays after its last lease, as Ollama's users know it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How long what nobody holds any more stays resident, if nobody needs the memory before. Each request sets it anew for what
/// it uses.
///
/// Written `5m`, `90s`, `0` (gone at once) or `-1` (no limit); a plain number is seconds, and any negative one is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KeepAlive {
    /// Until somebody needs the memory.
    #[default]
    Unlimited,
    /// For so long after the last lease.
    For(Duration),
}

impl KeepAlive {
    /// When what was released at this time goes.
    #[must_use]
    pub const fn until(self, released: Duration) -> Option<Duration> {
        match self {
            Self::Unlimited => None,
            Self::For(idle) => Some(released.saturating_add(idle)),
        }
    }
}

/// A text that is no such time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no keep-alive: write 5m, 90s, 0 for none, or -1 for no limit")]
pub struct ParseKeepAliveError {
    /// What was written.
    pub text: String,
}

impl FromStr for KeepAlive {
    type Err = ParseKeepAliveError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let error = || ParseKeepAliveError {
            text: text.to_owned(),
        };
        if let Ok(seconds) = text.parse::<f64>() {
            return Self::seconds(seconds).ok_or_else(error);
        }
        // As Ollama takes it: any negative duration.
        let (negative, rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        match humantime::parse_duration(rest) {
            Ok(_) if negative => Ok(Self::Unlimited),
            Ok(idle) => Ok(Self::For(idle)),
            Err(_) => Err(error()),
        }
    }
}

impl KeepAlive {
    fn seconds(seconds: f64) -> Option<Self> {
        if seconds < 0.0 {
            return Some(Self::Unlimited);
        }
        Duration::try_from_secs_f64(seconds).ok().map(Self::For)
    }
}

impl fmt::Display for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.pad("-1"),
            Self::For(idle) => f.pad(&humantime::format_duration(*idle).to_string()),
        }
    }
}

impl Serialize for KeepAlive {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeepAlive {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Seconds(f64),
            Text(String),
        }
        let error = serde::de::Error::custom::<String>;
        match Written::deserialize(deserializer)? {
            Written::Seconds(seconds) => Self::seconds(seconds)
                .ok_or_else(|| error(format!("{seconds} seconds are no time"))),
            Written::Text(text) => text
                .parse()
                .map_err(|e: ParseKeepAliveError| error(e.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_as_for_ollama() {
        let read = |text: &str| text.parse::<KeepAlive>().ok();
        let seconds = |s| Some(KeepAlive::For(Duration::from_secs(s)));
        assert_eq!(read("5m"), seconds(300));
        assert_eq!(read("3600"), seconds(3600));
        assert_eq!(read("0"), seconds(0));
        assert_eq!(read("-1"), Some(KeepAlive::Unlimited));
        assert_eq!(read("-1m"), Some(KeepAlive::Unlimited));
        for wrong in ["", "soon", "5 parsecs", "nan", "inf", "--5m"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        let json = |text: &str| serde_json::from_str::<KeepAlive>(text).ok();
        assert_eq!(json("90"), seconds(90));
        assert_eq!(json("-1"), Some(KeepAlive::Unlimited));
        assert_eq!(json("\"24h\""), seconds(86_400));
        for kept in [
            KeepAlive::Unlimited,
            KeepAlive::For(Duration::from_secs(90)),
        ] {
            assert_eq!(read(&kept.to_string()), Some(kept));
        }
    }
}
