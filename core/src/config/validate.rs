//! What a configuration's types do not say of its values.

use std::time::Duration;

use super::Config;
use crate::catalog::IMAGE_ALIGN;
use crate::units::Bytes;

/// A value that cannot be used, though it has the right type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("wrong value for `{key}`: {reason}")]
pub struct InvalidConfig {
    /// The key with dots; GPUs by index, as in `gpu.0.budget`.
    pub key: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

/// The shortest time between two measurements of memory pressure: a shorter one would measure itself.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

impl Config {
    /// Checks each value's range, and the values against each other.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        above_zero("catalog.max_depth", self.catalog.max_depth)?;
        budget("ram.budget", self.ram.budget)?;
        watermarks("ram", self.ram.low_watermark, self.ram.high_watermark)?;
        for (i, set) in self.set.iter().enumerate() {
            let at = |key: &str| format!("set.{i}.{key}");
            check(&at("name"), !set.name.trim().is_empty(), || {
                "give the set a name".into()
            })?;
            let before = self.set.iter().take(i);
            check(
                &at("name"),
                before.clone().all(|other| other.name != set.name),
                || {
                    format!(
                        "there is another set `{}`; give one of them another name",
                        set.name
                    )
                },
            )?;
            check(&at("models"), !set.models.is_empty(), || {
                "name at least one model".into()
            })?;
            for (key, names) in [("order", &set.order), ("drafts", &set.drafts)] {
                let unknown = names.iter().find(|name| !set.models.contains(name));
                check(&at(key), unknown.is_none(), || {
                    format!(
                        "`{}` is not among the models of the set; add it there, or leave it out",
                        unknown.map_or("", String::as_str)
                    )
                })?;
            }
        }
        for (i, gpu) in self.gpu.iter().enumerate() {
            let at = format!("gpu.{i}");
            budget(&format!("{at}.budget"), gpu.budget)?;
            share(&format!("{at}.share"), gpu.share)?;
            watermarks(&at, gpu.low_watermark, gpu.high_watermark)?;
            some_bytes(&format!("{at}.sim.memory"), gpu.sim.memory)?;
            some_bytes(&format!("{at}.sim.granularity"), gpu.sim.granularity)?;
            some_bytes(&format!("{at}.sim.bandwidth"), gpu.sim.bandwidth)?;
        }
        share("cuda.share", self.cuda.share)?;
        some_time("cuda.call_timeout", self.cuda.call_timeout)?;
        above_zero("load.concurrency", self.load.concurrency)?;
        above_zero("load.reads", self.load.reads)?;
        some_time("load.deadline", self.load.deadline)?;
        pages("load.piece", self.load.piece, IMAGE_ALIGN)?;
        check(
            "load.in_flight",
            self.load.in_flight >= self.load.piece,
            || {
                format!(
                    "{} is less than one piece, {}; give at least that",
                    self.load.in_flight, self.load.piece
                )
            },
        )?;
        // Each half of the ring is read into by itself.
        pages("load.ring", self.load.ring, 2 * IMAGE_ALIGN)?;
        above_zero("sessions.max_sessions", self.sessions.max_sessions)?;
        above_zero(
            "sessions.max_loads_per_session",
            self.sessions.max_loads_per_session,
        )?;
        above_zero("sessions.max_loads", self.sessions.max_loads)?;
        for (i, quota) in self.quota.iter().enumerate() {
            check(&format!("quota.{i}.label"), !quota.label.is_empty(), || {
                "it is empty; give the label that clients use, or `*` for each of them".into()
            })?;
        }
        above_zero("bridge.max_requests", self.bridge.max_requests)?;
        some_bytes("bridge.max_behind", self.bridge.max_behind)?;
        let guarded = self
            .http
            .token
            .as_ref()
            .is_some_and(|token| !token.is_empty());
        let open = self.http.listen.filter(|at| !at.ip().is_loopback());
        check("http.token", guarded || open.is_none(), || {
            format!(
                "http.listen can be reached from other machines{}; set a token, or listen on 127.0.0.1",
                open.map(|at| format!(" ({at})")).unwrap_or_default()
            )
        })?;
        some_time("predict.horizon", self.predict.horizon)?;
        check(
            "predict.threshold",
            (0.0..=1.0).contains(&self.predict.threshold),
            || format!("{} is no probability; give 0 to 1", self.predict.threshold),
        )?;
        above_zero("predict.max_tracked", self.predict.max_tracked)?;
        let supervision = &self.supervision;
        some_time("supervision.window", supervision.window)?;
        some_time("supervision.retry", supervision.retry)?;
        check(
            "supervision.max_backoff",
            supervision.backoff <= supervision.max_backoff,
            || {
                format!(
                    "{:?} is less than supervision.backoff, {:?}; give at least that",
                    supervision.max_backoff, supervision.backoff
                )
            },
        )?;
        check(
            "monitor.interval",
            self.monitor.interval >= SHORTEST_INTERVAL,
            || {
                format!(
                    "{:?} is too short; give at least {SHORTEST_INTERVAL:?}",
                    self.monitor.interval
                )
            },
        )?;
        check(
            "monitor.gpu_interval",
            self.monitor.gpu_interval >= SHORTEST_INTERVAL,
            || {
                format!(
                    "{:?} is too short; give at least {SHORTEST_INTERVAL:?}",
                    self.monitor.gpu_interval
                )
            },
        )
    }
}

fn check(key: &str, holds: bool, reason: impl FnOnce() -> String) -> Result<(), InvalidConfig> {
    if holds {
        Ok(())
    } else {
        Err(InvalidConfig {
            key: key.to_owned(),
            reason: reason(),
        })
    }
}

fn above_zero(key: &str, value: usize) -> Result<(), InvalidConfig> {
    check(key, value > 0, || {
        "0 lets nothing happen; give 1 or more".into()
    })
}

fn some_bytes(key: &str, value: Bytes) -> Result<(), InvalidConfig> {
    check(key, !value.is_zero(), || {
        "it is zero; give a size such as 1GiB".into()
    })
}

fn some_time(key: &str, value: Duration) -> Result<(), InvalidConfig> {
    check(key, !value.is_zero(), || {
        "it is zero; give a duration such as 30s".into()
    })
}

fn budget(key: &str, value: Option<Bytes>) -> Result<(), InvalidConfig> {
    value.map_or(Ok(()), |bytes| some_bytes(key, bytes))
}

fn share(key: &str, value: f64) -> Result<(), InvalidConfig> {
    check(key, value > 0.0 && value <= 1.0, || {
        format!("{value} is no share of a GPU's memory; give more than 0 and at most 1")
    })
}

fn watermarks(section: &str, low: f64, high: f64) -> Result<(), InvalidConfig> {
    check(
        &format!("{section}.high_watermark"),
        high > 0.0 && high <= 1.0,
        || format!("{high} is no share of a budget; give more than 0 and at most 1"),
    )?;
    check(
        &format!("{section}.low_watermark"),
        low > 0.0 && low <= high,
        || format!("{low} is not between 0 and the high watermark, {high}"),
    )
}

fn pages(key: &str, value: Bytes, page: u64) -> Result<(), InvalidConfig> {
    check(
        key,
        !value.is_zero() && value.get().is_multiple_of(page),
        || {
            let right = value.round_up(page).get().max(page);
            format!(
                "{} is no multiple of {page} bytes; the next one is {right}",
                value.get()
            )
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GpuConfig;

    #[test]
    fn the_defaults_are_valid() {
        let mut config = Config::default();
        assert_eq!(config.validate(), Ok(()));
        config.gpu.push(GpuConfig::default());
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn each_wrong_value_is_named() {
        type Spoil = fn(&mut Config);
        let cases: [(&str, Spoil); 18] = [
            ("ram.low_watermark", |c| c.ram.low_watermark = 0.99),
            ("ram.high_watermark", |c| c.ram.high_watermark = 1.5),
            ("ram.high_watermark", |c| c.ram.high_watermark = f64::NAN),
            ("ram.budget", |c| c.ram.budget = Some(Bytes::ZERO)),
            ("gpu.0.low_watermark", |c| c.gpu[0].low_watermark = 0.0),
            ("gpu.0.sim.granularity", |c| {
                c.gpu[0].sim.granularity = Bytes::ZERO;
            }),
            ("load.concurrency", |c| c.load.concurrency = 0),
            ("load.piece", |c| c.load.piece = Bytes(5000)),
            ("load.in_flight", |c| c.load.in_flight = Bytes::mib(1)),
            ("load.ring", |c| c.load.ring = Bytes(4096)),
            ("load.deadline", |c| c.load.deadline = Duration::ZERO),
            ("sessions.max_loads", |c| c.sessions.max_loads = 0),
            ("predict.threshold", |c| c.predict.threshold = 1.1),
            ("supervision.max_backoff", |c| {
                c.supervision.max_backoff = Duration::from_millis(1);
            }),
            ("monitor.interval", |c| c.monitor.interval = Duration::ZERO),
            ("monitor.gpu_interval", |c| {
                c.monitor.gpu_interval = Duration::ZERO;
            }),
            ("gpu.0.share", |c| c.gpu[0].share = 0.0),
            ("cuda.share", |c| c.cuda.share = f64::NAN),
        ];
        for (key, spoil) in cases {
            let mut config = Config {
                gpu: vec![GpuConfig::default()],
                ..Config::default()
            };
            spoil(&mut config);
            assert_eq!(config.validate().unwrap_err().key, key);
        }
    }
}
