//! Memory that is made ready before anybody asks for it: the first load of a component then finds it warm.

use std::cmp::Reverse;
use std::sync::Arc;

use hotset_core::Bytes;

use crate::discovery::DiscoveryMessage;
use crate::house::House;

/// Makes memory warm for the largest components, up to `ram.prewarm`, once the catalogue is known. In the background, and
/// only as long as nothing else is loaded.
pub(crate) fn start(house: &Arc<House>) {
    if house.config.ram.prewarm.is_zero() {
        return;
    }
    let task = run(house.clone());
    house.tasks.spawn(task);
}

async fn run(house: Arc<House>) {
    tokio::select! {
        biased;
        () = house.stop.cancelled() => return,
        _ = house.discovery.insist(DiscoveryMessage::Published) => {}
    }
    let catalogue = house.catalogue.load();
    let mut sizes: Vec<Bytes> = catalogue
        .models()
        .flat_map(|model| &model.components)
        .map(|component| component.ram_bytes())
        .collect();
    sizes.sort_unstable_by_key(|bytes| Reverse(*bytes));
    let mut left = house.config.ram.prewarm;
    let warmed = house.clone();
    let work = move || {
        for bytes in sizes {
            let wanted = || !warmed.stop.is_cancelled();
            if bytes > left || !wanted() {
                continue;
            }
            match warmed.arena.prewarm(bytes, &wanted) {
                Ok(true) => left = left.saturating_sub(bytes),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "no memory could be made ready");
                    return;
                }
            }
        }
        tracing::info!(warm = %warmed.arena.view().warm, "memory is ready");
    };
    // It ends early where the system does.
    let _ = house.off_thread(work).await;
}
