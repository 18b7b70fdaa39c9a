//! How long it takes to lease what is resident already, in process.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use hotset::{Bytes, ComponentSet, Config, Hotset, Session, Target};
use safetensors::tensor::{Dtype, TensorView};
use tokio::runtime::Runtime;

/// Components of a diffusion pipeline with its adapters.
const COMPONENTS: usize = 7;
/// Bytes of each; what they are is no matter, since nothing is copied.
const BYTES: usize = 1 << 20;

async fn resident(folder: &std::path::Path) -> (Hotset, Session, ComponentSet) {
    let names: Vec<String> = (0..COMPONENTS).map(|i| format!("component-{i}")).collect();
    for (i, name) in names.iter().enumerate() {
        let bytes = vec![i as u8; BYTES];
        let view = TensorView::new(Dtype::U8, vec![BYTES], &bytes).expect("a valid tensor");
        let file = folder.join(format!("{name}.safetensors"));
        safetensors::serialize_to_file([("weight", view)], None, &file).expect("a written file");
    }
    let mut config = Config::default();
    config.catalog.roots = vec![folder.to_owned()];
    config.catalog.watch = false;
    config.ram.budget = Some(Bytes::mib(64));
    let hotset = Hotset::builder()
        .config(config)
        .start()
        .await
        .expect("a system");
    let session = hotset.session("bench").await.expect("a session");
    let set = ComponentSet::new(names).on(Target::Ram);
    session
        .load(set.clone())
        .leases()
        .await
        .expect("a first load");
    (hotset, session, set)
}

fn attach(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let runtime = Runtime::new().expect("a runtime");
    let (hotset, session, set) = runtime.block_on(resident(folder.path()));
    let mut group = criterion.benchmark_group("attach");
    group.measurement_time(Duration::from_secs(5));
    group.bench_function("lease seven resident components", |bencher| {
        bencher
            .to_async(&runtime)
            .iter(|| async { session.load(set.clone()).leases().await.expect("leases") });
    });
    let one = ComponentSet::new(["component-0"]).on(Target::Ram);
    group.bench_function("lease one resident component", |bencher| {
        bencher
            .to_async(&runtime)
            .iter(|| async { session.load(one.clone()).leases().await.expect("a lease") });
    });
    group.finish();
    runtime.block_on(async {
        drop(session);
        hotset.drain().await;
    });
}

criterion_group!(benches, attach);
criterion_main!(benches);
