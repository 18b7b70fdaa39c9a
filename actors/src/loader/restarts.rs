//! Hearing of restarts, after which a message may be lost.

use hotset_core::Tier;

use crate::house::House;
use crate::ram_cache::RamCacheMessage;
use crate::vram_manager::VramManagerMessage;

/// Tells when the keeper of a tier was started again.
pub(super) enum Restarts {
    Ram(hotset_core::watch::Receiver<Option<ractor::ActorRef<RamCacheMessage>>>),
    Vram(hotset_core::watch::Receiver<Option<ractor::ActorRef<VramManagerMessage>>>),
    Never,
}

impl Restarts {
    pub(super) fn of(house: &House, tier: Tier) -> Self {
        match tier {
            Tier::Ram => Self::Ram(house.ram.subscribe()),
            Tier::Vram(gpu) => house
                .vram
                .get(&gpu)
                .map_or(Self::Never, |slot| Self::Vram(slot.subscribe())),
        }
    }

    pub(super) async fn changed(&mut self) {
        let changed = match self {
            Self::Ram(slot) => slot.changed().await.is_ok(),
            Self::Vram(slot) => slot.changed().await.is_ok(),
            Self::Never => false,
        };
        if !changed {
            std::future::pending::<()>().await;
        }
    }
}
