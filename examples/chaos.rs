//! A host's own load under faults: cargo run --example chaos

use std::sync::Arc;
use std::time::Duration;

use hotset::chaos::{ChaosError, Profile, Scenario, Workload, run, shrink};
use hotset::{ComponentSet, Target};

fn main() -> Result<(), ChaosError> {
    // Each client has a favourite, and asks for another model now and then.
    let ask =
        |client: usize, _turn: usize, models: &[String], draw: &mut dyn FnMut(usize) -> usize| {
            let model = if draw(4) == 0 {
                draw(models.len())
            } else {
                client
            };
            ComponentSet::new([models[model % models.len()].as_str()]).on(Target::AnyGpu)
        };
    let scenario = Scenario {
        workload: Workload::Own(Arc::new(ask)),
        time: Duration::from_secs(30),
        ..Scenario::of(Profile::Hot)
    };
    for seed in 0..10 {
        let outcome = run(&scenario, seed)?;
        println!(
            "seed {seed}: {} faults, {} of {} loads granted, {} violations",
            outcome.faults.len(),
            outcome.granted,
            outcome.requests,
            outcome.violations.len()
        );
        if !outcome.violations.is_empty() {
            let small = shrink(&scenario, outcome)?;
            println!("{:#?} after {:#?}", small.violations, small.faults);
        }
    }
    Ok(())
}
