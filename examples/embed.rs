//! A host process that embeds hotset: loads a component set and looks at its tensors.
//!
//! `cargo run --example embed -- FOLDER MODEL..`

use futures::StreamExt;
use hotset::{ComponentSet, Config, Hotset, LoadEvent, Place};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: embed FOLDER MODEL..")?;

    let mut config = Config::default();
    config.catalog.roots = vec![folder.into()];
    let hotset = Hotset::builder().config(config).start().await?;
    for model in hotset.catalogue().models() {
        println!("{} is a {} of {}", model.name, model.kind, model.bytes);
    }

    let set = ComponentSet::new(arguments);
    println!("plan: {}", hotset.plan(&set)?.fit);
    let session = hotset.session("embed example").await?;
    let mut loading = session.load(set);
    let mut leases = Vec::new();
    while let Some(event) = loading.next().await {
        match event? {
            LoadEvent::Progress(progress) => println!("{} of {}", progress.done, progress.total),
            LoadEvent::Leased(lease) => leases.push(lease),
            LoadEvent::Planned(_) | LoadEvent::Done => {}
        }
    }

    for lease in &leases {
        // While the lease lives, these bytes stay where they are; nothing was copied to get at them.
        for tensor in lease.tensors().take(3) {
            let place = match tensor.place {
                Place::Host(bytes) => format!("{} bytes in RAM", bytes.len()),
                Place::Device { gpu, address, .. } => format!("on GPU {gpu} at {address:#x}"),
            };
            println!(
                "{} {:?} {:?}: {place}",
                tensor.name, tensor.dtype, tensor.shape
            );
        }
    }
    drop(leases);
    hotset.drain().await;
    Ok(())
}
