//! A model library in a temporary folder, and a system over it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use hotset::core::config::GpuConfig;
use hotset::core::device::sim::SimDevice;
use hotset::core::io::{OpenComponent, PreadReader, ReadError, ReadOn, Reader};
use hotset::core::memory::SlabWriter;
use hotset::core::policy::lru::Lru;
use hotset::core::policy::{Candidate, EvictionPolicy, Guess, Victim};
use hotset::core::tensor::TensorTable;
use hotset::{
    Bytes, Component, Config, Device, Dtype, GpuIndex, Hotset, Lease, LoadError, Loading, Place,
};
use safetensors::tensor::TensorView;
use tempfile::TempDir;
use tokio::sync::Semaphore;

/// Long enough for any step on a busy machine; only ever reached by a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Fails instead of hanging.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not end"))
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    soon(what, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Bytes that differ from file to file and from place to place.
pub(crate) fn contents(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// The tensors of a file by name.
pub(crate) type Tensors = HashMap<String, Vec<u8>>;

/// Writes a safetensors file of `count` F16 tensors with `bytes` bytes in all, and gives what is in it.
pub(crate) fn write_weights(path: &Path, seed: u64, count: usize, bytes: usize) -> Tensors {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let each = bytes / count / 2 * 2;
    let tensors: Tensors = (0..count)
        .map(|i| {
            (
                format!("block.{i}.weight"),
                contents(seed * 1000 + i as u64, each),
            )
        })
        .collect();
    let views = tensors.iter().map(|(name, bytes)| {
        let view = TensorView::new(safetensors::Dtype::F16, vec![bytes.len() / 2], bytes).unwrap();
        (name.clone(), view)
    });
    // In one piece, so that no scan sees half of it.
    let partial = path.with_extension("part");
    std::fs::write(&partial, safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::rename(partial, path).unwrap();
    tensors
}

pub(crate) fn write_json(path: &Path, value: &serde_json::Value) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, value.to_string()).unwrap();
}

/// A folder of models.
pub(crate) struct Library {
    pub(crate) dir: TempDir,
}

impl Library {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A single-file model of about this many KiB.
    pub(crate) fn single(&self, name: &str, seed: u64, kib: usize) -> Tensors {
        write_weights(
            &self.path(&format!("{name}.safetensors")),
            seed,
            4,
            kib << 10,
        )
    }

    /// A diffusers pipeline of four components, each of about this many KiB; gives the tensors of each component.
    pub(crate) fn pipeline(&self, name: &str, seed: u64, kib: usize) -> HashMap<String, Tensors> {
        let parts = [
            ("text_encoder", "CLIPTextModel", kib),
            ("text_encoder_2", "CLIPTextModelWithProjection", kib),
            ("unet", "UNet2DConditionModel", kib),
            ("vae", "AutoencoderKL", kib),
        ];
        self.pipeline_of(name, seed, &parts)
    }

    /// A diffusers pipeline of these parts: folder, class and KiB of each.
    pub(crate) fn pipeline_of(
        &self,
        name: &str,
        seed: u64,
        parts: &[(&str, &str, usize)],
    ) -> HashMap<String, Tensors> {
        let root = self.path(name);
        let mut tensors = HashMap::new();
        let mut index = serde_json::Map::new();
        for (i, (part, class, kib)) in parts.iter().enumerate() {
            let encoder = part.contains("encoder");
            let (file, from) = if encoder {
                ("model.safetensors", "transformers")
            } else {
                ("diffusion_pytorch_model.safetensors", "diffusers")
            };
            write_json(
                &root.join(part).join("config.json"),
                &serde_json::json!({"_class_name": class, "architectures": [class]}),
            );
            let path = root.join(part).join(file);
            tensors.insert(
                (*part).to_owned(),
                write_weights(&path, seed * 10 + i as u64, 3, kib << 10),
            );
            index.insert((*part).to_owned(), serde_json::json!([from, class]));
        }
        index.insert("_class_name".into(), "StableDiffusionXLPipeline".into());
        write_json(&root.join("model_index.json"), &index.into());
        tensors
    }

    pub(crate) fn config(&self, ram: Bytes) -> Config {
        let mut config = Config::default();
        config.catalog.roots = vec![self.dir.path().to_owned()];
        config.catalog.watch = false;
        config.ram.budget = Some(ram);
        // Tests decide themselves when something goes.
        config.ram.high_watermark = 1.0;
        config.ram.low_watermark = 1.0;
        config.load.piece = Bytes::kib(64);
        // Tests run alike on every machine.
        config.cuda.detect = false;
        config
    }

    /// The same with one simulated GPU of this size.
    pub(crate) fn config_with_gpu(&self, ram: Bytes, vram: Bytes) -> Config {
        let mut config = self.config(ram);
        let mut gpu = GpuConfig {
            budget: Some(vram),
            headroom: Bytes::ZERO,
            ..GpuConfig::default()
        };
        gpu.sim.memory = vram;
        gpu.sim.granularity = Bytes::kib(64);
        gpu.sim.keep_bytes = true;
        config.gpu = vec![gpu];
        config
    }
}

/// A system over the configuration, with handles to its doubles.
pub(crate) struct Rig {
    pub(crate) hotset: Hotset,
    pub(crate) reader: Arc<GatedReader>,
    pub(crate) gpus: Vec<Arc<SimDevice>>,
}

impl Rig {
    pub(crate) async fn start(config: Config) -> Self {
        let reader = Arc::new(GatedReader::default());
        let gpus: Vec<_> = (0..)
            .zip(&config.gpu)
            .map(|(i, gpu)| SimDevice::new(GpuIndex(i), gpu.sim.clone()))
            .collect();
        let devices = gpus
            .iter()
            .map(|gpu| gpu.clone() as Arc<dyn Device>)
            .collect();
        let hotset = Hotset::builder()
            .config(config)
            .reader(reader.clone())
            .devices(devices)
            .start()
            .await
            .unwrap();
        Self {
            hotset,
            reader,
            gpus,
        }
    }

    /// Nothing is promised, held or allocated any more, once all that may go has gone.
    pub(crate) async fn assert_empty(&self) {
        until("all bytes to come back", async || {
            for view in self.hotset.ledger().views() {
                let _ = self.hotset.optimise_cache(view.tier, 0.0).await;
            }
            let empty = |view: &hotset::core::memory::TierView| {
                view.committed == Bytes::ZERO && view.residencies.is_empty()
            };
            self.hotset.ledger().views().iter().all(empty)
        })
        .await;
        for gpu in &self.gpus {
            assert_eq!(gpu.allocated(), Bytes::ZERO, "device memory leaked");
        }
    }
}

/// The real reader behind a gate: counts what is opened, and lets pieces through only as far as permitted.
#[derive(Debug)]
pub(crate) struct GatedReader {
    inner: PreadReader,
    opened: AtomicUsize,
    gate: Arc<Semaphore>,
}

impl Default for GatedReader {
    fn default() -> Self {
        Self {
            inner: PreadReader,
            opened: AtomicUsize::new(0),
            gate: Arc::new(Semaphore::new(OPEN)),
        }
    }
}

const OPEN: usize = Semaphore::MAX_PERMITS / 2;

impl GatedReader {
    pub(crate) fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    /// From now on no piece passes.
    pub(crate) fn close(&self) {
        self.gate.forget_permits(OPEN);
    }

    /// Lets this many pieces pass.
    pub(crate) fn pass(&self, pieces: usize) {
        self.gate.add_permits(pieces);
    }

    /// Lets everything pass again.
    pub(crate) fn open_wide(&self) {
        self.gate.add_permits(OPEN);
    }
}

impl Reader for GatedReader {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn open(
        &self,
        component: Arc<Component>,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        let (inner, gate) = (self.inner, self.gate.clone());
        async move {
            let open = inner.open(component).await?;
            Ok(Box::new(Gated { open, gate }) as Box<dyn OpenComponent>)
        }
        .boxed()
    }
}

struct Gated {
    open: Box<dyn OpenComponent>,
    gate: Arc<Semaphore>,
}

impl OpenComponent for Gated {
    fn image_bytes(&self) -> Bytes {
        self.open.image_bytes()
    }

    fn table(&self) -> &Arc<TensorTable> {
        self.open.table()
    }

    fn read(
        self: Box<Self>,
        into: SlabWriter,
        most: Bytes,
    ) -> BoxFuture<'static, Result<ReadOn, ReadError>> {
        async move {
            let Self { open, gate } = *self;
            gate.acquire().await.unwrap().forget();
            let (open, into) = open.read(into, most).await?;
            Ok((
                Box::new(Self { open, gate }) as Box<dyn OpenComponent>,
                into,
            ))
        }
        .boxed()
    }
}

/// The end of a load, within the patience of a test.
pub(crate) async fn outcome(loading: Loading) -> Result<Vec<Lease>, LoadError> {
    soon("the load", loading.leases()).await
}

/// Every tensor of the lease has these bytes, wherever it is.
pub(crate) async fn assert_tensors(lease: &Lease, expected: &Tensors) {
    assert_eq!(lease.tensors().count(), expected.len());
    for (name, bytes) in expected {
        let view = lease.tensor(name).unwrap();
        assert_eq!(view.dtype, Dtype::F16);
        assert_eq!(view.shape, [bytes.len() / 2]);
        match view.place {
            Place::Host(host) => assert!(host == bytes, "{name} differs in RAM"),
            Place::Device {
                address, bytes: n, ..
            } => {
                let allocation = lease.allocation().unwrap();
                assert_eq!(address % 256, 0, "{name} is not aligned");
                let read = allocation
                    .device()
                    .download(allocation, address - allocation.address(), n.get())
                    .await
                    .unwrap();
                assert!(read == *bytes, "{name} differs on the device");
            }
        }
    }
}

/// LRU, for whom a guess is worth everything, or nothing.
pub(crate) struct Gambler {
    pub(crate) generous: bool,
}

impl EvictionPolicy for Gambler {
    fn name(&self) -> &'static str {
        "gambler"
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        Lru.rank(now, candidates)
    }

    fn room_for_guess(
        &mut self,
        now: Duration,
        guess: &Guess,
        residents: &[Candidate],
        needed: Bytes,
    ) -> Option<Vec<Victim>> {
        assert!(guess.certain && !needed.is_zero());
        let all: Bytes = residents.iter().map(|c| c.bytes).sum();
        (self.generous && all >= needed).then(|| self.choose(now, residents, needed))
    }
}
