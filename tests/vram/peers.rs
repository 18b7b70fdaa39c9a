//! Several GPUs: what one holds comes to the others from there.

use crate::*;

fn on(name: &str, gpu: u32) -> ComponentSet {
    ComponentSet::new([name]).on(Target::Gpu(GpuIndex(gpu)))
}

#[test]
fn a_component_comes_from_the_gpu_that_has_it() {
    run(this_test!(), gpus(2), |machine| {
        let library = Library::new();
        let tensors = library.pipeline("base", 1, 900);
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            let first = outcome(session.load(on("base", 0))).await.unwrap();
            // RAM has it no longer.
            until("RAM to be empty", async || {
                let _ = hotset.optimise_cache(Tier::Ram, 0.0).await;
                tier(&hotset, Tier::Ram).await.committed.is_zero()
            })
            .await;
            let before = hotset.status().await.counters;
            let uploads = machine.calls(Call::cuMemcpyHtoDAsync);
            let second = outcome(session.load(on("base", 1))).await.unwrap();
            for lease in &second {
                assert_eq!(lease.tier(), Tier::Vram(GpuIndex(1)));
                assert_tensors(lease, &tensors[&*lease.component().id.component]).await;
            }
            let after = hotset.status().await.counters;
            assert_eq!(machine.calls(Call::cuMemcpyPeerAsync), 4);
            assert_eq!(machine.calls(Call::cuMemcpyHtoDAsync), uploads);
            assert_eq!(after.reads, before.reads, "the disk is not asked again");
            assert_eq!(after.uploads, before.uploads + 4);
            assert!(after.bytes_from_peers >= (4 * 900) << 10);
            // While it was copied, the first could not go; now it may, and the second stays.
            drop(first);
            until("the first GPU to be empty", async || {
                let _ = hotset.optimise_cache(GPU, 0.0).await;
                tier(&hotset, GPU).await.committed.is_zero()
            })
            .await;
            for lease in &second {
                assert_tensors(lease, &tensors[&*lease.component().id.component]).await;
            }
            drop(second);
            end(hotset).await;
        });
    });
}

#[test]
fn what_is_being_copied_stays_where_it_is() {
    run(this_test!(), gpus(2), |machine| {
        let library = Library::new();
        let tensors = library.single("a", 1, 5000);
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            drop(outcome(session.load(on("a", 0))).await.unwrap());
            let gpu = machine.gpu(1);
            gpu.hold_copies.store(1, SeqCst);
            let loading = session.load(on("a", 1));
            until("the copy to begin", async || {
                machine.calls(Call::cuMemcpyPeerAsync) == 1
            })
            .await;
            let freed = hotset.optimise_cache(GPU, 0.0).await.unwrap();
            assert_eq!(freed, Bytes::ZERO, "somebody reads it");
            gpu.hold_copies.store(0, SeqCst);
            let leases = outcome(loading).await.unwrap();
            assert_tensors(&leases[0], &tensors).await;
            drop(leases);
            end(hotset).await;
        });
    });
}

#[test]
fn a_link_that_does_not_work_is_not_used_again() {
    run(this_test!(), gpus(2), |machine| {
        let library = Library::new();
        let tensors = library.single("a", 1, 3000);
        library.single("b", 2, 3000);
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            let first = outcome(session.load(on("a", 0))).await.unwrap();
            machine.gpu(1).refuse_peer_copies.store(1, SeqCst);
            let second = outcome(session.load(on("a", 1))).await.unwrap();
            assert_tensors(&second[0], &tensors).await;
            assert_eq!(machine.calls(Call::cuMemcpyPeerAsync), 1, "tried once");
            let more = outcome(session.load(on("b", 0))).await.unwrap();
            let again = outcome(session.load(on("b", 1))).await.unwrap();
            assert_eq!(machine.calls(Call::cuMemcpyPeerAsync), 1);
            assert_eq!(hotset.status().await.health, Health::Green);
            drop((first, second, more, again));
            end(hotset).await;
        });
    });
}

#[test]
fn a_set_goes_to_the_nearest_of_equal_gpus() {
    run(this_test!(), gpus(3), |machine| {
        // The first has room for one of the two only.
        set_room(machine, 40);
        let gpu = machine.gpu(0);
        let taken = gpu.reserved.load(SeqCst) + gpu.context.load(SeqCst);
        gpu.total.store(taken + (10 << 20), SeqCst);
        // The third is nearer to it than the second.
        machine.gpu(1).distance[0].store(2, SeqCst);
        machine.gpu(2).distance[0].store(1, SeqCst);
        let library = Library::new();
        let (a, b) = (library.single("a", 1, 7000), library.single("b", 2, 7000));
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            let held = outcome(session.load(on("a", 0))).await.unwrap();
            let both = outcome(session.load(ComponentSet::new(["a", "b"])))
                .await
                .unwrap();
            for (lease, tensors) in both.iter().zip([&a, &b]) {
                assert_eq!(lease.tier(), Tier::Vram(GpuIndex(2)));
                assert_tensors(lease, tensors).await;
            }
            assert_eq!(machine.calls(Call::cuMemcpyPeerAsync), 1, "one of them");
            drop((held, both));
            end(hotset).await;
        });
    });
}
