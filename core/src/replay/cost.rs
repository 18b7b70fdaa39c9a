//! What loading costs: seconds for each load, and seconds for each GB.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// Written `0.4s+1s/GB`; a GB is 10^9 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LoadCost {
    /// Seconds for each load.
    pub fixed_s: f64,
    /// Seconds for each GB.
    pub per_gb_s: f64,
}

impl LoadCost {
    /// What loading this many bytes takes, in seconds.
    #[must_use]
    pub fn seconds(&self, bytes: Bytes) -> f64 {
        self.fixed_s + self.per_gb_s * bytes.as_f64() / 1e9
    }
}

impl Default for LoadCost {
    /// What a plain SSD and building the model around its weights take.
    fn default() -> Self {
        Self {
            fixed_s: 0.4,
            per_gb_s: 1.0,
        }
    }
}

impl fmt::Display for LoadCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s+{}s/GB", self.fixed_s, self.per_gb_s)
    }
}

/// A cost that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a load cost: write seconds for each load and for each GB, such as 0.4s+1s/GB"
)]
pub struct ParseLoadCostError {
    /// What was written.
    pub text: String,
}

impl FromStr for LoadCost {
    type Err = ParseLoadCostError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseLoadCostError {
            text: text.to_owned(),
        };
        let mut cost = Self {
            fixed_s: 0.0,
            per_gb_s: 0.0,
        };
        for term in text.split('+').map(str::trim) {
            let (number, place) = match term.strip_suffix("/GB") {
                Some(rate) => (rate, &mut cost.per_gb_s),
                None => (term, &mut cost.fixed_s),
            };
            let number = number.trim().strip_suffix('s').ok_or_else(error)?;
            let seconds: f64 = number.trim().parse().map_err(|_| error())?;
            if !seconds.is_finite() || seconds < 0.0 {
                return Err(error());
            }
            *place += seconds;
        }
        Ok(cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_read_and_written() {
        let cost: LoadCost = "0.4s+1s/GB".parse().unwrap();
        assert_eq!(cost, LoadCost::default());
        assert_eq!(cost.to_string().parse(), Ok(cost));
        assert!((cost.seconds(Bytes(2_500_000_000)) - 2.9).abs() < 1e-12);
        assert_eq!("2 s/GB".parse::<LoadCost>().unwrap().fixed_s, 0.0);
        for wrong in ["", "1", "-1s", "NaNs", "1s/MB", "1s++1s"] {
            assert!(wrong.parse::<LoadCost>().is_err(), "{wrong}");
        }
    }
}
