//! A model library of sparse files with true headers: as many keys, as long names and as much metadata as real ones have,
//! and no weights.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

/// Files in one folder.
const FILES_PER_FOLDER: u64 = 500;

/// One file of the library.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) path: PathBuf,
    /// Bytes from the file's start to the end of its header.
    pub(super) header_bytes: u64,
}

/// Tensors by name and shape.
type Tensors = Vec<(String, Vec<u64>)>;

/// Writes the library. The same seed gives the same one.
pub(super) fn make(folder: &Path, files: u64, seed: u64) -> io::Result<Vec<Made>> {
    let folders = files.div_ceil(FILES_PER_FOLDER);
    for i in 0..folders {
        std::fs::create_dir_all(folder.join(format!("folder-{i:04}")))?;
    }
    (0..files)
        .into_par_iter()
        .map(|i| {
            let mut rng =
                Xoshiro256PlusPlus::seed_from_u64(seed ^ (i + 1).wrapping_mul(0x9e37_79b9));
            let into = folder.join(format!("folder-{:04}", i / FILES_PER_FOLDER));
            one(&into, i, &mut rng)
        })
        .collect()
}

/// One file of a kind that the number picks: adapters are most of a real library.
pub(super) fn one(folder: &Path, number: u64, rng: &mut impl RngCore) -> io::Result<Made> {
    let rank = [4, 8, 16, 32, 64, 128][pick(rng, 6)];
    let dtype = ["F16", "BF16", "F32"][pick(rng, 3)];
    match number % 20 {
        0..=6 => put(
            folder,
            "sdxl-lora",
            number,
            dtype,
            &lora_sdxl(rank),
            true,
            rng,
        ),
        7..=9 => put(
            folder,
            "sd1-lora",
            number,
            dtype,
            &lora_sd1(rank),
            true,
            rng,
        ),
        10..=12 => put(
            folder,
            "flux-lora",
            number,
            dtype,
            &lora_flux(rank),
            false,
            rng,
        ),
        13 | 14 => put(
            folder,
            "sd1",
            number,
            dtype,
            &checkpoint(320, 768, 12),
            false,
            rng,
        ),
        15 | 16 => put(
            folder,
            "sdxl",
            number,
            dtype,
            &checkpoint(320, 2048, 40),
            false,
            rng,
        ),
        17 => put(
            folder,
            "embedding",
            number,
            dtype,
            &vec![("emb_params".into(), vec![8, 768])],
            false,
            rng,
        ),
        _ => gguf(folder, number, rng),
    }
}

fn pick(rng: &mut impl RngCore, of: u32) -> usize {
    (rng.next_u32() % of) as usize
}

fn pair(into: &mut Tensors, name: &str, rank: u64, inner: u64, outer: u64) {
    into.push((format!("{name}.alpha"), vec![]));
    into.push((format!("{name}.lora_down.weight"), vec![rank, inner]));
    into.push((format!("{name}.lora_up.weight"), vec![outer, rank]));
}

fn lora_sdxl(rank: u64) -> Tensors {
    let mut t = Vec::new();
    for block in 4..9 {
        for layer in 0..10 {
            let at = format!("lora_unet_input_blocks_{block}_1_transformer_blocks_{layer}");
            for (module, inner) in [
                ("attn1_to_q", 1280),
                ("attn1_to_k", 1280),
                ("attn1_to_v", 1280),
                ("attn1_to_out_0", 1280),
                ("attn2_to_q", 1280),
                ("attn2_to_k", 2048),
                ("attn2_to_v", 2048),
                ("attn2_to_out_0", 1280),
                ("ff_net_0_proj", 1280),
                ("ff_net_2", 5120),
            ] {
                pair(&mut t, &format!("{at}_{module}"), rank, inner, 1280);
            }
        }
    }
    for layer in 0..32 {
        for module in [
            "self_attn_q_proj",
            "self_attn_k_proj",
            "self_attn_v_proj",
            "self_attn_out_proj",
            "mlp_fc1",
            "mlp_fc2",
        ] {
            pair(
                &mut t,
                &format!("lora_te2_text_model_encoder_layers_{layer}_{module}"),
                rank,
                1280,
                1280,
            );
        }
    }
    t
}

fn lora_sd1(rank: u64) -> Tensors {
    let mut t = Vec::new();
    for block in 0..12 {
        let at = format!(
            "lora_unet_down_blocks_{}_attentions_{}_transformer_blocks_0",
            block / 4,
            block % 4
        );
        for (module, inner) in [
            ("attn1_to_q", 640),
            ("attn1_to_k", 640),
            ("attn1_to_v", 640),
            ("attn2_to_q", 640),
            ("attn2_to_k", 768),
            ("attn2_to_v", 768),
            ("ff_net_0_proj", 640),
            ("ff_net_2", 2560),
        ] {
            pair(&mut t, &format!("{at}_{module}"), rank, inner, 640);
        }
    }
    for layer in 0..12 {
        for module in [
            "self_attn_q_proj",
            "self_attn_k_proj",
            "self_attn_v_proj",
            "self_attn_out_proj",
            "mlp_fc1",
            "mlp_fc2",
        ] {
            pair(
                &mut t,
                &format!("lora_te_text_model_encoder_layers_{layer}_{module}"),
                rank,
                768,
                768,
            );
        }
    }
    t
}

fn lora_flux(rank: u64) -> Tensors {
    let mut t = Vec::new();
    for block in 0..19 {
        for module in [
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_out.0",
            "ff.net.0.proj",
        ] {
            let at = format!("transformer.transformer_blocks.{block}.{module}");
            t.push((format!("{at}.lora_A.weight"), vec![rank, 3072]));
            t.push((format!("{at}.lora_B.weight"), vec![3072, rank]));
        }
    }
    for block in 0..38 {
        for module in [
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "proj_mlp",
            "norm.linear",
        ] {
            let at = format!("transformer.single_transformer_blocks.{block}.{module}");
            t.push((format!("{at}.lora_A.weight"), vec![rank, 3072]));
            t.push((format!("{at}.lora_B.weight"), vec![3072, rank]));
        }
    }
    t
}

fn checkpoint(width: u64, context: u64, depth: u64) -> Tensors {
    let mut t = Vec::new();
    let unet = "model.diffusion_model";
    t.push((
        format!("{unet}.input_blocks.0.0.weight"),
        vec![width, 4, 3, 3],
    ));
    if context == 2048 {
        t.push((format!("{unet}.label_emb.0.0.weight"), vec![1280, 2816]));
    }
    for block in 0..12 {
        t.push((
            format!("{unet}.output_blocks.{block}.0.in_layers.0.weight"),
            vec![width],
        ));
        for layer in 0..depth.div_ceil(4) {
            for module in [
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "attn2.to_q",
                "attn2.to_k",
                "attn2.to_v",
                "attn2.to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
                "norm1",
                "norm2",
            ] {
                let inner = if module == "attn2.to_k" || module == "attn2.to_v" {
                    context
                } else {
                    width
                };
                t.push((
                    format!(
                        "{unet}.input_blocks.{block}.1.transformer_blocks.{layer}.{module}.weight"
                    ),
                    vec![width, inner],
                ));
                t.push((
                    format!(
                        "{unet}.input_blocks.{block}.1.transformer_blocks.{layer}.{module}.bias"
                    ),
                    vec![width],
                ));
            }
        }
    }
    for layer in 0..12 {
        for module in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            t.push((format!("cond_stage_model.transformer.text_model.encoder.layers.{layer}.self_attn.{module}.weight"), vec![768, 768]));
        }
    }
    for block in 0..4 {
        for layer in 0..24 {
            t.push((
                format!("first_stage_model.decoder.up.{block}.block.{layer}.conv1.weight"),
                vec![128, 128, 3, 3],
            ));
        }
    }
    t
}

/// Writes a safetensors file whose data is a hole.
fn put(
    folder: &Path,
    kind: &str,
    number: u64,
    dtype: &str,
    tensors: &Tensors,
    kohya: bool,
    rng: &mut impl RngCore,
) -> io::Result<Made> {
    let size = if dtype == "F32" { 4 } else { 2 };
    let mut header = String::with_capacity(tensors.len() * 160);
    header.push_str("{\"__metadata__\":{");
    if kohya {
        let base = if kind == "sdxl-lora" {
            "sdxl_base_v1-0"
        } else {
            "sd_v1"
        };
        let _ = write!(
            header,
            "\"ss_base_model_version\":\"{base}\",\"ss_output_name\":\"{number}\",\"ss_tag_frequency\":\"{{"
        );
        for _ in 0..100 {
            let _ = write!(
                header,
                "\\\"tag {:08x}\\\": {}, ",
                rng.next_u32(),
                rng.next_u32() % 100
            );
        }
        header.push_str("}\"");
    } else {
        let _ = write!(header, "\"format\":\"pt\",\"made\":\"{number}\"");
    }
    header.push('}');
    let mut at = 0;
    for (name, shape) in tensors {
        let end = at + shape.iter().product::<u64>() * size;
        let _ = write!(header, ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":[");
        for (i, dimension) in shape.iter().enumerate() {
            let _ = write!(header, "{}{dimension}", if i > 0 { "," } else { "" });
        }
        let _ = write!(header, "],\"data_offsets\":[{at},{end}]}}");
        at = end;
    }
    header.push('}');
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let path = folder.join(format!("{kind}-{number:06}.safetensors"));
    let mut file = File::create(&path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let header_bytes = 8 + header.len() as u64;
    file.set_len(header_bytes + at)?;
    Ok(Made { path, header_bytes })
}

fn gguf(folder: &Path, number: u64, rng: &mut impl RngCore) -> io::Result<Made> {
    let mut header = b"GGUF".to_vec();
    let text = |into: &mut Vec<u8>, text: &str| {
        into.extend((text.len() as u64).to_le_bytes());
        into.extend(text.as_bytes());
    };
    let layers = 32_u64;
    header.extend(3_u32.to_le_bytes());
    header.extend((layers * 9 + 1).to_le_bytes());
    header.extend(3_u64.to_le_bytes());
    for (key, value) in [
        ("general.architecture", "llama".to_owned()),
        ("general.name", format!("model {number}")),
    ] {
        text(&mut header, key);
        header.extend(8_u32.to_le_bytes());
        text(&mut header, &value);
    }
    text(&mut header, "tokenizer.ggml.tokens");
    header.extend(9_u32.to_le_bytes());
    header.extend(8_u32.to_le_bytes());
    header.extend(4000_u64.to_le_bytes());
    for _ in 0..4000 {
        text(
            &mut header,
            &format!("{:x}", rng.next_u32() >> (rng.next_u32() % 20)),
        );
    }
    let mut at = 0_u64;
    let mut tensor = |name: String, rows: u64| {
        text(&mut header, &name);
        header.extend(2_u32.to_le_bytes());
        header.extend(4096_u64.to_le_bytes());
        header.extend(rows.to_le_bytes());
        header.extend(12_u32.to_le_bytes());
        header.extend(at.to_le_bytes());
        at += (4096 * rows / 256 * 144).next_multiple_of(32);
    };
    tensor("token_embd.weight".into(), 4000);
    for layer in 0..layers {
        for module in [
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
            "attn_norm",
            "ffn_norm",
        ] {
            tensor(format!("blk.{layer}.{module}.weight"), 256);
        }
    }
    header.resize(header.len().next_multiple_of(32), 0);
    let path = folder.join(format!("llama-{number:06}.gguf"));
    let mut file = File::create(&path)?;
    file.write_all(&header)?;
    let header_bytes = header.len() as u64;
    file.set_len(header_bytes + at)?;
    Ok(Made { path, header_bytes })
}
