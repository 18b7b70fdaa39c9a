//! A small model library with the layouts and tensor names of real models, and made-up weights.
//!
//! Only a few blocks of each network are written, with their true shapes, so that the files are what a catalogue meets in
//! the wild, at a hundredth of the size.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// How large the library becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scale {
    /// True shapes; about half a GiB.
    Full,
    /// First dimensions cut down; a few MiB, for tests.
    Tiny,
}

/// The names of what was made.
#[derive(Debug)]
pub(crate) struct Library {
    pub(crate) pipeline: &'static str,
    pub(crate) lora: &'static str,
    pub(crate) controlnet: &'static str,
    pub(crate) second_pipeline: &'static str,
}

/// A tensor to write.
type Spec = (String, Vec<usize>);

struct Writer {
    root: PathBuf,
    scale: Scale,
    seed: u64,
}

/// How much the first dimension of a large tensor is cut down in a tiny library.
const TINY_DIVISOR: usize = 64;

impl Writer {
    fn json(&self, path: &str, value: &Value) -> io::Result<()> {
        let path = self.root.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(path, format!("{value:#}\n"))
    }

    /// Writes a safetensors file of F16 tensors with contents that differ from file to file.
    fn weights(&mut self, path: &str, specs: &[Spec], metadata: &[(&str, &str)]) -> io::Result<()> {
        let path = self.root.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut tensors = Vec::with_capacity(specs.len());
        for (name, shape) in specs {
            let mut shape = shape.clone();
            if self.scale == Scale::Tiny
                && let Some(first) = shape.first_mut()
            {
                *first = (*first / TINY_DIVISOR).max(4);
            }
            let bytes = self.noise(2 * shape.iter().product::<usize>());
            tensors.push((name.as_str(), shape, bytes));
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            TensorView::new(Dtype::F16, shape.clone(), bytes).map(|view| (*name, view))
        });
        let views: Vec<_> = views.collect::<Result<_, _>>().map_err(io::Error::other)?;
        let metadata: HashMap<String, String> = metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(io::Error::other)
    }

    /// Small halves of either sign: xorshift bits under a fixed exponent, so that no weight is a NaN.
    fn noise(&mut self, bytes: usize) -> Vec<u8> {
        self.seed += 1;
        let mut state = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut out = Vec::with_capacity(bytes + 8);
        while out.len() < bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Sign and mantissa are random, the exponent is that of 0.03125.
            out.extend(((state & 0x83ff_83ff_83ff_83ff) | 0x2800_2800_2800_2800).to_le_bytes());
        }
        out.truncate(bytes);
        out
    }
}

fn spec(name: impl Into<String>, shape: &[usize]) -> Spec {
    (name.into(), shape.to_vec())
}

/// A CLIP text model.
fn clip(prefix: &str, width: usize, layers: usize, projection: Option<usize>) -> Vec<Spec> {
    let mut specs = vec![
        // A tenth of the real vocabulary.
        spec(
            format!("{prefix}text_model.embeddings.token_embedding.weight"),
            &[4940, width],
        ),
        spec(
            format!("{prefix}text_model.embeddings.position_embedding.weight"),
            &[77, width],
        ),
        spec(
            format!("{prefix}text_model.final_layer_norm.weight"),
            &[width],
        ),
        spec(
            format!("{prefix}text_model.final_layer_norm.bias"),
            &[width],
        ),
    ];
    for layer in 0..layers {
        let at = format!("{prefix}text_model.encoder.layers.{layer}");
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            specs.push(spec(
                format!("{at}.self_attn.{part}.weight"),
                &[width, width],
            ));
            specs.push(spec(format!("{at}.self_attn.{part}.bias"), &[width]));
        }
        specs.push(spec(format!("{at}.mlp.fc1.weight"), &[4 * width, width]));
        specs.push(spec(format!("{at}.mlp.fc2.weight"), &[width, 4 * width]));
    }
    if let Some(out) = projection {
        specs.push(spec(
            format!("{prefix}text_projection.weight"),
            &[out, width],
        ));
    }
    specs
}

/// One transformer block of a UNet in the names of diffusers and of the original alike.
fn transformer_block(at: &str, width: usize, context: usize) -> Vec<Spec> {
    let mut specs = Vec::new();
    for part in ["to_q", "to_k", "to_v", "to_out.0"] {
        specs.push(spec(format!("{at}.attn1.{part}.weight"), &[width, width]));
    }
    for (part, from) in [
        ("to_q", width),
        ("to_k", context),
        ("to_v", context),
        ("to_out.0", width),
    ] {
        specs.push(spec(format!("{at}.attn2.{part}.weight"), &[width, from]));
    }
    specs.push(spec(
        format!("{at}.ff.net.0.proj.weight"),
        &[8 * width, width],
    ));
    specs.push(spec(format!("{at}.ff.net.2.weight"), &[width, 4 * width]));
    specs
}

/// A UNet as diffusers names it. `context` is the width of the text that it reads.
fn unet(context: usize, xl: bool, blocks: usize) -> Vec<Spec> {
    let mut specs = vec![
        spec("conv_in.weight", &[320, 4, 3, 3]),
        spec("conv_in.bias", &[320]),
        spec("time_embedding.linear_1.weight", &[1280, 320]),
        spec("time_embedding.linear_2.weight", &[1280, 1280]),
        spec("conv_out.weight", &[4, 320, 3, 3]),
        spec("conv_norm_out.weight", &[320]),
    ];
    if xl {
        specs.push(spec("add_embedding.linear_1.weight", &[1280, 2816]));
        specs.push(spec("add_embedding.linear_2.weight", &[1280, 1280]));
    }
    let down = if xl { "down_blocks.1" } else { "down_blocks.0" };
    let width = if xl { 640 } else { 320 };
    specs.extend(transformer_block(
        &format!("{down}.attentions.0.transformer_blocks.0"),
        width,
        context,
    ));
    for block in 0..blocks {
        let at = format!("mid_block.attentions.0.transformer_blocks.{block}");
        specs.extend(transformer_block(&at, 1280, context));
    }
    specs
}

/// An autoencoder as diffusers names it.
fn vae() -> Vec<Spec> {
    let mut specs = Vec::new();
    for (side, out) in [("encoder", 8), ("decoder", 3)] {
        let latent = if side == "encoder" { 3 } else { 4 };
        let first = if side == "encoder" { 128 } else { 512 };
        specs.push(spec(
            format!("{side}.conv_in.weight"),
            &[first, latent, 3, 3],
        ));
        for (i, name) in ["resnets.0", "resnets.1"].iter().enumerate() {
            let at = format!("{side}.mid_block.{name}");
            specs.push(spec(format!("{at}.norm1.weight"), &[512]));
            specs.push(spec(
                format!("{at}.conv{}.weight", i + 1),
                &[512, 512, 3, 3],
            ));
        }
        for part in ["to_q", "to_k", "to_v"] {
            let at = format!("{side}.mid_block.attentions.0.{part}.weight");
            specs.push(spec(at, &[512, 512]));
        }
        let last = if side == "encoder" { 512 } else { 128 };
        specs.push(spec(format!("{side}.conv_out.weight"), &[out, last, 3, 3]));
    }
    specs.push(spec("quant_conv.weight", &[8, 8, 1, 1]));
    specs.push(spec("post_quant_conv.weight", &[4, 4, 1, 1]));
    specs
}

impl Writer {
    /// A diffusers pipeline folder. `parts` are folder, library, class and weights.
    fn pipeline(
        &mut self,
        root: &str,
        class: &str,
        parts: Vec<(&str, &str, &str, Vec<Spec>)>,
    ) -> io::Result<()> {
        let mut index = serde_json::Map::new();
        index.insert("_class_name".into(), class.into());
        index.insert("_diffusers_version".into(), "0.30.0".into());
        for (folder, library, class, specs) in parts {
            index.insert(folder.into(), json!([library, class]));
            let (config, file) = if library == "transformers" {
                (
                    json!({"architectures": [class], "model_type": "clip_text_model"}),
                    "model",
                )
            } else {
                (json!({"_class_name": class}), "diffusion_pytorch_model")
            };
            self.json(&format!("{root}/{folder}/config.json"), &config)?;
            let path = format!("{root}/{folder}/{file}.safetensors");
            self.weights(&path, &specs, &[("format", "pt")])?;
        }
        index.insert(
            "scheduler".into(),
            json!(["diffusers", "EulerDiscreteScheduler"]),
        );
        self.json(
            &format!("{root}/scheduler/scheduler_config.json"),
            &json!({"_class_name": "EulerDiscreteScheduler"}),
        )?;
        self.json(&format!("{root}/model_index.json"), &index.into())
    }

    /// A LoRA in the names of kohya, for the attention of one block.
    fn lora(&mut self, path: &str, width: usize, context: usize) -> io::Result<()> {
        const RANK: usize = 64;
        let mut specs = Vec::new();
        for block in 0..4 {
            for (part, from) in [
                ("attn1_to_q", width),
                ("attn1_to_k", width),
                ("attn1_to_v", width),
                ("attn2_to_q", width),
                ("attn2_to_k", context),
                ("attn2_to_v", context),
            ] {
                let at =
                    format!("lora_unet_mid_block_attentions_0_transformer_blocks_{block}_{part}");
                specs.push(spec(format!("{at}.lora_down.weight"), &[RANK, from]));
                specs.push(spec(format!("{at}.lora_up.weight"), &[width, RANK]));
                specs.push(spec(format!("{at}.alpha"), &[1]));
            }
        }
        let metadata = [
            ("ss_base_model_version", "sdxl_base_v1-0"),
            ("ss_network_module", "networks.lora"),
            ("ss_network_dim", "64"),
            ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
        ];
        self.weights(path, &specs, &metadata)
    }

    /// A ControlNet in the layout of diffusers.
    fn controlnet(&mut self, root: &str) -> io::Result<()> {
        let mut specs = unet(2048, true, 0);
        specs.retain(|(name, _)| {
            !name.starts_with("conv_out") && !name.starts_with("conv_norm_out")
        });
        specs.push(spec(
            "controlnet_cond_embedding.conv_in.weight",
            &[16, 3, 3, 3],
        ));
        specs.push(spec(
            "controlnet_cond_embedding.conv_out.weight",
            &[320, 256, 3, 3],
        ));
        for block in 0..9 {
            specs.push(spec(
                format!("controlnet_down_blocks.{block}.weight"),
                &[320, 320, 1, 1],
            ));
        }
        specs.push(spec("controlnet_mid_block.weight", &[1280, 1280, 1, 1]));
        self.json(
            &format!("{root}/config.json"),
            &json!({"_class_name": "ControlNetModel", "cross_attention_dim": 2048}),
        )?;
        let path = format!("{root}/diffusion_pytorch_model.safetensors");
        self.weights(&path, &specs, &[("format", "pt")])
    }

    /// A whole SDXL pipeline in one file, with the original's key prefixes.
    fn checkpoint(&mut self, path: &str) -> io::Result<()> {
        let unet_at = "model.diffusion_model";
        let mut specs = vec![
            spec(
                format!("{unet_at}.input_blocks.0.0.weight"),
                &[320, 4, 3, 3],
            ),
            spec(format!("{unet_at}.time_embed.0.weight"), &[1280, 320]),
            spec(format!("{unet_at}.label_emb.0.0.weight"), &[1280, 2816]),
            spec(format!("{unet_at}.out.2.weight"), &[4, 320, 3, 3]),
        ];
        let block = format!("{unet_at}.input_blocks.4.1.transformer_blocks.0");
        specs.extend(transformer_block(&block, 640, 2048));
        specs.extend(clip("conditioner.embedders.0.transformer.", 768, 1, None));
        let second = "conditioner.embedders.1.model";
        specs.push(spec(
            format!("{second}.token_embedding.weight"),
            &[4940, 1280],
        ));
        specs.push(spec(format!("{second}.positional_embedding"), &[77, 1280]));
        specs.push(spec(format!("{second}.text_projection"), &[1280, 1280]));
        let block = format!("{second}.transformer.resblocks.0");
        specs.push(spec(format!("{block}.attn.in_proj_weight"), &[3840, 1280]));
        specs.push(spec(format!("{block}.mlp.c_fc.weight"), &[5120, 1280]));
        for side in ["encoder", "decoder"] {
            let at = format!("first_stage_model.{side}");
            specs.push(spec(
                format!("{at}.mid.block_1.conv1.weight"),
                &[512, 512, 3, 3],
            ));
            specs.push(spec(format!("{at}.mid.attn_1.q.weight"), &[512, 512, 1, 1]));
        }
        specs.push(spec(
            "first_stage_model.encoder.conv_in.weight",
            &[128, 3, 3, 3],
        ));
        specs.push(spec(
            "first_stage_model.decoder.conv_in.weight",
            &[512, 4, 3, 3],
        ));
        self.weights(path, &specs, &[])
    }

    /// A language model in three shards.
    fn language_model(&mut self, root: &str) -> io::Result<()> {
        const WIDTH: usize = 1024;
        let mut shards: Vec<Vec<Spec>> = vec![Vec::new(); 3];
        shards[0].push(spec("model.embed_tokens.weight", &[4000, WIDTH]));
        shards[2].push(spec("lm_head.weight", &[4000, WIDTH]));
        shards[2].push(spec("model.norm.weight", &[WIDTH]));
        for layer in 0..6 {
            let at = format!("model.layers.{layer}");
            let shard = &mut shards[layer / 2];
            for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                shard.push(spec(
                    format!("{at}.self_attn.{part}.weight"),
                    &[WIDTH, WIDTH],
                ));
            }
            for part in ["gate_proj", "up_proj"] {
                shard.push(spec(format!("{at}.mlp.{part}.weight"), &[2816, WIDTH]));
            }
            shard.push(spec(format!("{at}.mlp.down_proj.weight"), &[WIDTH, 2816]));
            shard.push(spec(format!("{at}.input_layernorm.weight"), &[WIDTH]));
        }
        let mut map = serde_json::Map::new();
        for (i, specs) in shards.iter().enumerate() {
            let file = format!("model-{:05}-of-00003.safetensors", i + 1);
            for (name, _) in specs {
                map.insert(name.clone(), file.clone().into());
            }
            self.weights(&format!("{root}/{file}"), specs, &[("format", "pt")])?;
        }
        self.json(
            &format!("{root}/model.safetensors.index.json"),
            &json!({"metadata": {}, "weight_map": map}),
        )?;
        self.json(
            &format!("{root}/config.json"),
            &json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH}),
        )
    }
}

/// Makes the library below `root`; `made` hears of each model.
///
/// # Errors
/// What the file system says.
pub(crate) fn make(root: &Path, scale: Scale, mut made: impl FnMut(&str)) -> io::Result<Library> {
    let mut writer = Writer {
        root: root.to_owned(),
        scale,
        seed: 0,
    };
    let library = Library {
        pipeline: "pipelines/sdxl-demo",
        lora: "loras/ink-sketch",
        controlnet: "controlnets/canny-sdxl",
        second_pipeline: "pipelines/sd15-demo",
    };
    writer.pipeline(
        library.pipeline,
        "StableDiffusionXLPipeline",
        vec![
            (
                "text_encoder",
                "transformers",
                "CLIPTextModel",
                clip("", 768, 2, None),
            ),
            (
                "text_encoder_2",
                "transformers",
                "CLIPTextModelWithProjection",
                clip("", 1280, 2, Some(1280)),
            ),
            (
                "unet",
                "diffusers",
                "UNet2DConditionModel",
                unet(2048, true, 2),
            ),
            ("vae", "diffusers", "AutoencoderKL", vae()),
        ],
    )?;
    made(library.pipeline);
    writer.lora(&format!("{}.safetensors", library.lora), 1280, 2048)?;
    made(library.lora);
    writer.controlnet(library.controlnet)?;
    made(library.controlnet);
    writer.pipeline(
        library.second_pipeline,
        "StableDiffusionPipeline",
        vec![
            (
                "text_encoder",
                "transformers",
                "CLIPTextModel",
                clip("", 768, 3, None),
            ),
            (
                "unet",
                "diffusers",
                "UNet2DConditionModel",
                unet(768, false, 2),
            ),
            ("vae", "diffusers", "AutoencoderKL", vae()),
        ],
    )?;
    made(library.second_pipeline);
    writer.checkpoint("checkpoints/sdxl-single.safetensors")?;
    made("checkpoints/sdxl-single");
    writer.language_model("llm/tiny-llama")?;
    made("llm/tiny-llama");
    Ok(library)
}
