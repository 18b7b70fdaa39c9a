//! Why there is no plan for a set, with the arithmetic.

use std::fmt;
use std::sync::Arc;

use super::nearest::Nearest;
use super::set::Target;
use crate::catalog::Component;
use crate::ids::{ComponentId, Tier};
use crate::memory::TierView;
use crate::units::Bytes;

/// One tier that is too small, with the sum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Which tier.
    pub tier: Tier,
    /// What the set takes there.
    pub needed: Bytes,
    /// What hotset may use there.
    pub budget: Bytes,
    /// The parts of the sum, largest first.
    pub parts: Vec<(ComponentId, Bytes)>,
    /// Why the tier is out of service, where it is.
    pub out_of_service: Option<Arc<str>>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reason) = &self.out_of_service {
            return write!(f, "{} is out of service ({reason})", self.tier);
        }
        const SHOWN: usize = 6;
        write!(
            f,
            "{} has a budget of {}, and the set needs {} there (",
            self.tier, self.budget, self.needed
        )?;
        for (i, (component, bytes)) in self.parts.iter().take(SHOWN).enumerate() {
            write!(f, "{}{component} {bytes}", if i == 0 { "" } else { " + " })?;
        }
        if self.parts.len() > SHOWN {
            write!(f, " + {} more", self.parts.len() - SHOWN)?;
        }
        write!(f, "), {} too much", self.needed.saturating_sub(self.budget))
    }
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// It fits nowhere, whatever is evicted.
    #[error("the set can never fit: {}; {}", all(shortages), mend(nearest))]
    NeverFits {
        /// Each tier that was considered, with the sum.
        shortages: Vec<Shortage>,
        /// What would fit.
        nearest: Vec<Nearest>,
    },
    /// The target does not exist.
    #[error("there is no {target}; this machine has {}", available.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    NoSuchTier {
        /// What was asked for.
        target: Target,
        /// What there is.
        available: Vec<Tier>,
    },
}

/// All tiers that are too small; those that want the same sum say it once.
fn all(shortages: &[Shortage]) -> String {
    let same = |a: &Shortage, b: &Shortage| {
        a.out_of_service.is_none()
            && b.out_of_service.is_none()
            && (a.needed, &a.parts) == (b.needed, &b.parts)
    };
    let told = |(i, shortage): (usize, &Shortage)| {
        let said = shortages
            .iter()
            .take(i)
            .any(|before| same(before, shortage));
        match said {
            true => format!("{} has {}", shortage.tier, shortage.budget),
            false => shortage.to_string(),
        }
    };
    shortages
        .iter()
        .enumerate()
        .map(told)
        .collect::<Vec<_>>()
        .join("; ")
}

fn sentence<T: ToString>(parts: &[T]) -> String {
    parts
        .iter()
        .map(T::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

fn mend(nearest: &[Nearest]) -> String {
    if nearest.is_empty() {
        "load fewer components, raise the budget, or choose another tier".into()
    } else {
        sentence(nearest)
    }
}

impl PlanError {
    /// It never fits, and nobody has looked yet what would.
    pub(super) const fn never(shortages: Vec<Shortage>) -> Self {
        Self::NeverFits {
            shortages,
            nearest: Vec::new(),
        }
    }
}

pub(super) fn shortage(
    view: &TierView,
    needed: Bytes,
    order: &[Arc<Component>],
    bytes_of: impl Fn(&Component) -> Bytes,
) -> Shortage {
    let mut parts: Vec<(ComponentId, Bytes)> = order
        .iter()
        .map(|component| (component.id.clone(), bytes_of(component)))
        .collect();
    parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    Shortage {
        tier: view.tier,
        needed,
        budget: view.budget,
        parts,
        out_of_service: view.out_of_service.clone(),
    }
}
