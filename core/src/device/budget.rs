//! How much of a GPU's memory hotset may promise now. Pure: figures in, bytes out.

use super::Figures;
use crate::config::GpuConfig;
use crate::units::Bytes;

/// The most that may be promised: what the configuration allows, and never more than there is room for once others have
/// taken theirs and the headroom is left free. What hotset's own allocations take already is part of it.
#[must_use]
pub fn allowed(config: &GpuConfig, figures: &Figures) -> Bytes {
    let configured = config
        .budget
        .unwrap_or_else(|| figures.total.share(config.share));
    let room = figures
        .free
        .saturating_add(figures.allocated)
        .saturating_sub(config.headroom);
    configured.min(room)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::FigureSource;
    use proptest::prelude::*;

    fn figures(total: u64, allocated: u64, overhead: u64, foreign: u64) -> Figures {
        let used = allocated + overhead + foreign;
        Figures {
            source: FigureSource::Nvml,
            total: Bytes::gib(total),
            free: Bytes::gib(total.saturating_sub(used)),
            allocated: Bytes::gib(allocated),
            overhead: Bytes::gib(overhead),
            context: None,
            foreign: Bytes::gib(foreign),
            processes: Vec::new(),
            temperature_c: None,
            throttling: Vec::new(),
            pcie: None,
            pcie_most: None,
            ecc_uncorrected: None,
            mig: None,
            xids: Vec::new(),
        }
    }

    fn config(budget: Option<u64>, share: f64, headroom: u64) -> GpuConfig {
        GpuConfig {
            budget: budget.map(Bytes::gib),
            share,
            headroom: Bytes::gib(headroom),
            ..GpuConfig::default()
        }
    }

    #[test]
    fn cases_by_hand() {
        // 24 GiB, of which a context takes one and others ten: 24 - 1 - 10 - 2 of headroom.
        let busy = figures(24, 4, 1, 10);
        assert_eq!(allowed(&config(None, 1.0, 2), &busy), Bytes::gib(11));
        // The configuration allows less.
        assert_eq!(allowed(&config(Some(5), 1.0, 2), &busy), Bytes::gib(5));
        assert_eq!(allowed(&config(None, 0.25, 2), &busy), Bytes::gib(6));
        // Others have taken nearly all: less than hotset has allocated, and something must go.
        let full = figures(24, 4, 1, 18);
        assert_eq!(allowed(&config(None, 1.0, 2), &full), Bytes::gib(3));
        let gone = figures(24, 0, 1, 23);
        assert_eq!(allowed(&config(None, 1.0, 2), &gone), Bytes::ZERO);
    }

    proptest! {
        #[test]
        fn what_is_allowed_always_fits(
            total in 1_u64..100, allocated in 0_u64..50, overhead in 0_u64..5, foreign in 0_u64..100,
            headroom in 0_u64..5, share in 0.0_f64..=1.0,
        ) {
            prop_assume!(allocated + overhead + foreign <= total);
            let allowed = allowed(&config(None, share, headroom), &figures(total, allocated, overhead, foreign));
            prop_assert!(allowed + Bytes::gib(overhead + foreign) <= Bytes::gib(total));
            prop_assert!(allowed <= Bytes::gib(total).share(share));
        }
    }
}
