use super::*;

fn outline(keys: &[(&str, &[u64])]) -> Outline {
    let mut outline = Outline::default();
    for (key, shape) in keys {
        outline.add(key, shape.iter().copied(), "F16");
    }
    outline
}

fn of(keys: &[(&str, &[u64])], metadata: &[(&str, &str)]) -> Identity {
    let metadata = metadata
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    let outline = outline(keys);
    identify(
        &Signatures::builtin(),
        &Clues {
            metadata: Some(&metadata),
            outline: Some(&outline),
            ..Clues::default()
        },
    )
}

#[track_caller]
fn is(identity: &Identity, kind: Kind, architecture: Option<&str>) {
    assert_eq!(
        (identity.kind, identity.architecture.as_deref()),
        (kind, architecture),
        "{:?}",
        identity.evidence
    );
}

#[test]
fn the_built_in_file_is_read() {
    assert!(Signatures::builtin().rules.len() > 150);
}

#[test]
fn loras_of_many_dialects_are_told() {
    let identity = of(
        &[
            (
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
                &[16, 2048],
            ),
            (
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
                &[640, 16],
            ),
        ],
        &[],
    );
    is(&identity, Kind::Lora, Some("sdxl"));
    assert_eq!(
        (identity.dialect.as_deref(), identity.rank),
        (Some("kohya"), Some(16))
    );
    assert_eq!(identity.base.unwrap().architecture.as_deref(), Some("sdxl"));

    let identity = of(
        &[(
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
            &[8, 768],
        )],
        &[],
    );
    is(&identity, Kind::Lora, Some("sd-1"));

    let identity = of(
        &[
            (
                "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
                &[16, 3072],
            ),
            (
                "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
                &[16, 3072],
            ),
        ],
        &[],
    );
    is(&identity, Kind::Lora, Some("flux"));
    assert_eq!(identity.dialect.as_deref(), Some("peft"));

    let identity = of(
        &[(
            "double_blocks.0.processor.qkv_lora1.down.weight",
            &[16, 3072],
        )],
        &[],
    );
    is(&identity, Kind::Lora, Some("flux"));
    assert_eq!(
        (identity.dialect.as_deref(), identity.rank),
        (Some("xlabs"), Some(16))
    );

    let identity = of(
        &[(
            "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight",
            &[16, 3072],
        )],
        &[],
    );
    is(&identity, Kind::Lora, Some("flux"));
    assert_eq!(identity.dialect.as_deref(), Some("onetrainer"));

    let identity = of(
        &[(
            "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight",
            &[16, 3072],
        )],
        &[("software", r#"{"name": "ai-toolkit"}"#)],
    );
    is(&identity, Kind::Lora, Some("qwen-image"));
    assert_eq!(identity.dialect.as_deref(), Some("ai-toolkit"));

    let identity = of(
        &[("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1", &[4, 4])],
        &[("ss_base_model_version", "flux1")],
    );
    is(&identity, Kind::Lora, Some("flux"));
    assert_eq!(identity.dialect.as_deref(), Some("lokr"));

    let identity = of(
        &[
            (
                "lora_unet_single_blocks_0_linear1.lora_down.weight",
                &[16, 6144],
            ),
            (
                "lora_unet_single_blocks_0_linear1.lora_up.weight",
                &[55296, 16],
            ),
        ],
        &[],
    );
    is(&identity, Kind::Lora, Some("flux2"));
}

#[test]
fn diffusion_models_are_told() {
    let flux: &[(&str, &[u64])] = &[
        ("double_blocks.0.img_attn.norm.key_norm.scale", &[128]),
        ("double_blocks.0.img_mod.lin.weight", &[18432, 3072]),
        ("single_blocks.0.linear1.weight", &[21504, 3072]),
        ("img_in.weight", &[3072, 384]),
    ];
    let identity = of(flux, &[]);
    is(&identity, Kind::Transformer, Some("flux"));
    assert_eq!(identity.variant.as_deref(), Some("fill"));
    let identity = of(
        &[
            ("double_stream_modulation_img.lin.weight", &[36864, 6144]),
            ("single_stream_modulation.lin.weight", &[18432, 6144]),
            ("txt_in.weight", &[6144, 15360]),
        ],
        &[],
    );
    is(&identity, Kind::Transformer, Some("flux2"));
    is(
        &of(
            &[
                ("net.blocks.0.mlp.layer1.weight", &[1]),
                ("net.llm_adapter.blocks.0.cross_attn.q_proj.weight", &[1]),
            ],
            &[],
        ),
        Kind::Transformer,
        Some("anima"),
    );
    is(
        &of(
            &[("model.diffusion_model.txtfusion.projector.weight", &[1])],
            &[],
        ),
        Kind::Transformer,
        Some("krea-2"),
    );
}

#[test]
fn a_checkpoint_takes_the_architecture_of_its_unet() {
    let identity = of(
        &[
            (
                "model.diffusion_model.input_blocks.0.0.weight",
                &[320, 9, 3, 3],
            ),
            (
                "model.diffusion_model.output_blocks.0.0.in_layers.0.weight",
                &[1],
            ),
            (
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
                &[320, 768],
            ),
            ("first_stage_model.decoder.conv_in.weight", &[512, 4, 3, 3]),
            (
                "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
                &[49408, 768],
            ),
        ],
        &[],
    );
    is(&identity, Kind::Checkpoint, Some("sd-1"));
    assert_eq!(identity.variant.as_deref(), Some("inpaint"));
}

#[test]
fn what_contradicts_itself_stays_open() {
    let identity = of(&[("something.weight", &[3, 3])], &[]);
    is(&identity, Kind::Unknown, None);
    assert_eq!(identity.base, None);
}

#[test]
fn users_add_signatures_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.toml");
    std::fs::write(
        &path,
        r#"
[[signature]]
id = "mine"
kind = "upscaler"
architecture = "mine"
score = 90
reason = "the marker of my trainer"
all = ["my_marker"]
"#,
    )
    .unwrap();
    let signatures = Signatures::with_files(std::slice::from_ref(&path)).unwrap();
    let outline = outline(&[("my_marker", &[1])]);
    let identity = identify(
        &signatures,
        &Clues {
            outline: Some(&outline),
            ..Clues::default()
        },
    );
    is(&identity, Kind::Upscaler, Some("mine"));
    assert_eq!(&*identity.evidence[0].source, "mine");
    std::fs::write(&path, "[[signature]]\nid = 'x'\nreason = ''\nscore = 1\n").unwrap();
    let error = Signatures::with_files(&[path]).unwrap_err().to_string();
    assert!(error.contains("no condition"), "{error}");
}

#[test]
fn drafts_are_told_by_their_configuration_with_their_target_and_its_tokens() {
    let of = |config: serde_json::Value| {
        let clues = Clues {
            config: Some(&config),
            ..Clues::default()
        };
        let identity = identify(&Signatures::builtin(), &clues);
        let tokenizer = tokenizer(identity.kind, &clues);
        let stated = identity.base.as_ref().and_then(|base| base.name.clone());
        (identity.kind, stated, tokenizer)
    };
    let family = |tokens, begin| Some(Tokenizer { tokens, begin });
    let eagle = serde_json::json!({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama",
        "vocab_size": 128256, "draft_vocab_size": 32000, "bos_token_id": 128000,
    });
    assert_eq!(
        of(eagle),
        (Kind::DraftModel, None, family(128_256, Some(128_000)))
    );
    let medusa = serde_json::json!({
        "architectures": ["MedusaModel"], "base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "vocab_size": 32000,
    });
    assert_eq!(
        of(medusa),
        (
            Kind::DraftModel,
            Some("lmsys/vicuna-7b-v1.3".into()),
            family(32_000, None)
        )
    );
    let speculator = serde_json::json!({
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "transformer_layer_config": {"vocab_size": 151936},
        "speculators_config": {"verifier": {"name_or_path": "Qwen/Qwen3-8B"}},
    });
    assert_eq!(
        of(speculator),
        (
            Kind::DraftModel,
            Some("Qwen/Qwen3-8B".into()),
            family(151_936, None)
        )
    );
    let target = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "bos_token_id": 151643,
    });
    let (kind, _, tokenizer) = of(target);
    assert_eq!(kind, Kind::LanguageModel);
    assert_eq!(tokenizer, family(151_936, Some(151_643)));
    // What speaks no tokens has none.
    let encoder = serde_json::json!({"architectures": ["CLIPTextModel"], "vocab_size": 49408});
    assert_eq!(of(encoder).2, None);
}

#[test]
fn without_a_configuration_the_embedding_and_the_pairs_of_gguf_tell_the_tokens() {
    let metadata = [
        ("general.architecture", "llama"),
        ("tokenizer.ggml.bos_token_id", "128000"),
    ];
    let metadata = metadata.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let outline = outline(&[
        ("blk.0.attn_q.weight", &[4096, 4096]),
        ("token_embd.weight", &[4096, 128_256]),
    ]);
    let clues = Clues {
        metadata: Some(&metadata),
        outline: Some(&outline),
        ..Clues::default()
    };
    let identity = identify(&Signatures::builtin(), &clues);
    is(&identity, Kind::LanguageModel, Some("llama"));
    let small = tokenizer(identity.kind, &clues).unwrap();
    assert_eq!((small.tokens, small.begin), (128_256, Some(128_000)));
    let family = |tokens, begin| small.is_of_family(&Tokenizer { tokens, begin });
    assert!(family(128_256, None) && family(128_384, Some(128_000)));
    assert!(!family(128_256, Some(1)) && !family(151_936, None));
    let eagle = of(
        &[
            ("midlayer.self_attn.q_proj.weight", &[4096, 8192]),
            ("fc.weight", &[4096, 12288]),
            ("d2t", &[32000]),
        ],
        &[],
    );
    is(&eagle, Kind::DraftModel, None);
}
