//! Qwen3-Omni: the whole model (`Qwen3OmniMoeForConditionalGeneration`), or its thinker alone with the towers that see and hear
//! (`Qwen3OmniMoeThinkerForConditionalGeneration`). Keys whose default in the class is not what was published must be there.

use std::borrow::Cow;

use protocol::PartKind;
use protocol::decoder::{Embedding, FeedForward, Head, QkNorm, QkvBias, SharedExpert};
use protocol::manifest::PartConfig;
use protocol::towers::{Audio, CHANNELS, CodePredictor, CodeToWave, Talker, TalkerCodes, TalkerTokens, Vision};
use serde_json::Value;

use super::keys::{COMMON, ConfigProblem, Key, KeyTable, Keys, wrong};
use super::qwen3_moe::{KEYS, decoder};
use super::{Family, Name, Preprocessors, Wrapper, decoder_of, usual_name};

pub(super) const QWEN3_OMNI: Family = Family {
    model_type: "qwen3_omni_moe",
    wrappers: &[Wrapper { inner: "thinker_config", keys: WHOLE }, Wrapper { inner: "text_config", keys: THINKER }],
    keys: KEYS,
    decoder,
    others: Some(parts_of_whole),
    name: name_in_whole,
    spell: spell_in_whole,
};

pub(super) const QWEN3_OMNI_THINKER: Family = Family {
    model_type: "qwen3_omni_moe_thinker",
    wrappers: &[Wrapper { inner: "text_config", keys: THINKER }],
    keys: KEYS,
    decoder,
    others: Some(parts_of_thinker),
    name: name_in_thinker,
    spell: spell_in_thinker,
};

const WHOLE: KeyTable = &[
    ("assistant_token_id", Key::Read),
    ("code2wav_config", Key::Read),
    ("enable_audio_output", Key::Read),
    ("im_end_token_id", Key::Read),
    ("im_start_token_id", Key::Read),
    ("system_token_id", Key::Read),
    ("talker_config", Key::Read),
    ("thinker_config", Key::Read),
    ("tts_bos_token_id", Key::Read),
    ("tts_eos_token_id", Key::Read),
    ("tts_pad_token_id", Key::Read),
    ("user_token_id", Key::Read),
];

const THINKER: KeyTable = &[
    ("audio_config", Key::Read),
    ("audio_end_token_id", Key::Read),
    ("audio_start_token_id", Key::Read),
    ("audio_token_id", Key::Read),
    ("image_token_id", Key::Read),
    ("position_id_per_seconds", Key::Read),
    ("seconds_per_chunk", Key::Ignored("sound and video are interleaved by their times alone")),
    ("text_config", Key::Read),
    ("user_token_id", Key::Ignored("of use to the talker alone")),
    ("video_token_id", Key::Read),
    ("vision_config", Key::Read),
    ("vision_end_token_id", Key::Read),
    ("vision_start_token_id", Key::Read),
];

const VISION: KeyTable = &[
    ("apply_vit_abs_pos_embed", Key::Read),
    ("deepstack_visual_indexes", Key::Read),
    ("depth", Key::Read),
    ("image_size", Key::Ignored("positions are interpolated to any size")),
    ("in_channels", Key::Read),
    ("in_chans", Key::Read),
    ("intermediate_size", Key::Read),
    ("num_heads", Key::Read),
    ("num_position_embeddings", Key::Read),
    ("out_hidden_size", Key::Read),
    ("patch_size", Key::Read),
    ("spatial_merge_size", Key::Read),
    ("spatial_patch_size", Key::Ignored("another word for patch_size")),
    ("temporal_patch_size", Key::Read),
    ("tokens_per_second", Key::Ignored("position_id_per_seconds counts")),
];

const AUDIO: KeyTable = &[
    ("activation_dropout", Key::Ignored("training")),
    ("activation_function", Key::Read),
    ("conv_chunksize", Key::Ignored("memory, not results")),
    ("d_model", Key::Read),
    ("downsample_hidden_size", Key::Read),
    ("dropout", Key::Ignored("training")),
    ("encoder_attention_heads", Key::Read),
    ("encoder_ffn_dim", Key::Read),
    ("encoder_layerdrop", Key::Ignored("training")),
    ("encoder_layers", Key::Read),
    ("max_source_positions", Key::Ignored("sinusoids begin anew with every chunk")),
    ("n_window", Key::Read),
    ("n_window_infer", Key::Read),
    ("num_mel_bins", Key::Read),
    ("output_dim", Key::Read),
    ("scale_embedding", Key::Off),
];

const TALKER: KeyTable = &[
    ("accept_hidden_layer", Key::Read),
    ("audio_end_token_id", Key::Ignored("the thinker says it")),
    ("audio_start_token_id", Key::Ignored("the thinker says it")),
    ("audio_token_id", Key::Ignored("the thinker says it")),
    ("code_predictor_config", Key::Read),
    ("codec_bos_id", Key::Read),
    ("codec_eos_token_id", Key::Read),
    ("codec_nothink_id", Key::Read),
    ("codec_pad_id", Key::Read),
    ("codec_think_bos_id", Key::Read),
    ("codec_think_eos_id", Key::Read),
    ("image_token_id", Key::Ignored("the thinker says it")),
    ("num_code_groups", Key::Read),
    ("position_id_per_seconds", Key::Ignored("the thinker says it")),
    ("seconds_per_chunk", Key::Ignored("sound and video are interleaved by their times alone")),
    ("spatial_merge_size", Key::Ignored("the vision tower says it")),
    ("speaker_id", Key::Read),
    ("text_config", Key::Read),
    ("thinker_hidden_size", Key::Read),
    ("user_token_id", Key::Ignored("the whole model says it")),
    ("video_token_id", Key::Ignored("the thinker says it")),
    ("vision_end_token_id", Key::Ignored("the thinker says it")),
    ("vision_start_token_id", Key::Ignored("the thinker says it")),
];

const TALKER_TEXT: KeyTable = &[
    ("attention_bias", Key::Off),
    ("decoder_sparse_step", Key::Read),
    ("head_dim", Key::Read),
    ("intermediate_size", Key::Read),
    ("max_window_layers", Key::Ignored("of use only with use_sliding_window")),
    ("mlp_only_layers", Key::Off),
    ("moe_intermediate_size", Key::Read),
    ("norm_topk_prob", Key::Read),
    ("num_experts", Key::Read),
    ("num_experts_per_tok", Key::Read),
    ("num_local_experts", Key::Read),
    ("shared_expert_intermediate_size", Key::Read),
    ("sliding_window", Key::Ignored("a window is named even where use_sliding_window says that there is none")),
    ("use_sliding_window", Key::Off),
];

const CODE_PREDICTOR: KeyTable = &[
    ("attention_bias", Key::Off),
    ("head_dim", Key::Read),
    ("intermediate_size", Key::Read),
    ("layer_types", Key::Read),
    ("max_window_layers", Key::Ignored("of use only with use_sliding_window")),
    ("num_code_groups", Key::Read),
    ("sliding_window", Key::Ignored("a window is named even where use_sliding_window says that there is none")),
    ("use_sliding_window", Key::Off),
];

const CODE_TO_WAVE: KeyTable = &[
    ("attention_bias", Key::Off),
    ("codebook_dim", Key::Ignored("of the encoder, which is not published")),
    ("codebook_size", Key::Read),
    ("decoder_dim", Key::Read),
    ("head_dim", Key::Off),
    ("intermediate_size", Key::Read),
    ("layer_scale_initial_scale", Key::Ignored("training")),
    ("num_quantizers", Key::Read),
    ("num_semantic_quantizers", Key::Ignored("of the encoder, which is not published")),
    ("semantic_codebook_size", Key::Ignored("of the encoder, which is not published")),
    ("sliding_window", Key::Read),
    ("upsample_rates", Key::Read),
    ("upsampling_ratios", Key::Read),
    ("vector_quantization_hidden_dimension", Key::Ignored("of the encoder, which is not published")),
];

/// What `preprocessor_config.json` and `video_preprocessor_config.json` may say. Absent, it is as published.
const PREPROCESSOR: KeyTable = &[
    ("chunk_length", Key::Ignored("sound is not cut")),
    ("crop_size", Key::Off),
    ("data_format", Key::Ignored("how arrays are handed on")),
    ("default_to_square", Key::Off),
    ("device", Key::Off),
    ("disable_grouping", Key::Off),
    ("dither", Key::Off),
    ("do_center_crop", Key::Off),
    ("do_convert_rgb", Key::Ignored("pictures are always RGB")),
    ("do_normalize", Key::Ignored("pictures are always normalised")),
    ("do_rescale", Key::Ignored("pictures are always rescaled")),
    ("do_resize", Key::Ignored("pictures are always resized")),
    ("do_sample_frames", Key::Ignored("frames are chosen before")),
    ("fps", Key::Ignored("whoever asks says it")),
    ("feature_extractor_type", Key::Ignored("its parameters say it")),
    ("feature_size", Key::Read),
    ("hop_length", Key::Read),
    ("image_mean", Key::Read),
    ("image_processor_type", Key::Ignored("its parameters say it")),
    ("image_std", Key::Read),
    ("max_frames", Key::Ignored("the limit of frames counts")),
    ("max_pixels", Key::Read),
    ("merge_size", Key::Read),
    ("min_frames", Key::Ignored("a video of few frames is looked at as it is")),
    ("min_pixels", Key::Read),
    ("n_fft", Key::Read),
    ("input_data_format", Key::Ignored("how arrays are handed on")),
    ("n_samples", Key::Ignored("sound is not cut")),
    ("nb_max_frames", Key::Ignored("sound is not cut")),
    ("padding_side", Key::Ignored("nothing is padded")),
    ("padding_value", Key::Ignored("nothing is padded")),
    ("patch_size", Key::Read),
    ("processor_class", Key::Ignored("its parameters say it")),
    ("resample", Key::Read),
    ("rescale_factor", Key::Read),
    ("return_metadata", Key::Off),
    ("return_tensors", Key::Off),
    ("return_attention_mask", Key::Ignored("nothing is padded")),
    ("sampling_rate", Key::Read),
    ("size", Key::Read),
    ("temporal_patch_size", Key::Read),
    ("video_metadata", Key::Off),
    ("video_processor_type", Key::Ignored("its parameters say it")),
];

const PIXELS_MIN: u32 = 3136;
const PIXELS_MAX: u32 = 12_845_056;
/// Of each frame of a video. The processor has these, whatever the file says of pictures.
const FRAME_PIXELS: [u32; 2] = [128 * 32 * 32, 768 * 32 * 32];

/// The number of the resize in preprocessor_config.json.
const BICUBIC: f64 = 3.0;

fn parts_of_whole(json: &Value, preprocessors: &Preprocessors) -> Result<Vec<PartConfig>, ConfigProblem> {
    let mut parts = parts_of_thinker(&json["thinker_config"], preprocessors)?;
    if Keys(json).boolean("enable_audio_output")?.unwrap_or(true)
        && ["talker_config", "code2wav_config"].iter().any(|name| json[name].is_object())
    {
        parts.extend(speaking_parts(json)?);
    }
    Ok(parts)
}

/// The towers that the configuration has.
fn parts_of_thinker(json: &Value, preprocessors: &Preprocessors) -> Result<Vec<PartConfig>, ConfigProblem> {
    let Preprocessors { pictures, videos } = preprocessors;
    check_preprocessor("preprocessor_config.json", pictures)?;
    check_preprocessor("video_preprocessor_config.json", videos)?;
    let mut parts = Vec::new();
    if json["vision_config"].is_object() {
        parts.push(PartConfig::Vision(vision(json, preprocessors).map_err(|problem| within("vision_config", &problem))?));
    }
    if json["audio_config"].is_object() {
        parts.push(PartConfig::Audio(audio(json, pictures).map_err(|problem| within("audio_config", &problem))?));
    }
    Ok(parts)
}

fn within(object: &str, problem: &ConfigProblem) -> ConfigProblem {
    ConfigProblem(format!("{object}: {}", problem.0))
}

/// Refuses another front end than Whisper's and Qwen2-VL's.
fn check_preprocessor(file: &str, json: &Value) -> Result<(), ConfigProblem> {
    let in_file = |problem: ConfigProblem| within(file, &problem);
    Keys(json).check_against(&[PREPROCESSOR]).map_err(in_file)?;
    let must = |name: &str, value: f64| match &json[name] {
        Value::Null => Ok(()),
        Value::Array(all) if !all.is_empty() && all.iter().all(|one| one.as_f64() == Some(value)) => Ok(()),
        one if one.as_f64().is_some_and(|one| (one - value).abs() <= 1e-9 * value) => Ok(()),
        _ => Err(in_file(wrong(name, &value.to_string()))),
    };
    let values = [
        ("hop_length", 160.0),
        ("image_mean", 0.5),
        ("image_std", 0.5),
        ("n_fft", 400.0),
        ("resample", BICUBIC),
        ("rescale_factor", 1.0 / 255.0),
        ("sampling_rate", 16_000.0),
    ];
    values.into_iter().try_for_each(|(name, value)| must(name, value))
}

/// A number of `preprocessor_config.json` that a part of the model has, too.
fn must_agree(preprocessor: &Value, name: &str, value: u32) -> Result<(), ConfigProblem> {
    match Keys(preprocessor).optional_integer(name)? {
        Some(other) if other != value => Err(wrong(name, &format!("{value} in preprocessor_config.json, too"))),
        _ => Ok(()),
    }
}

fn vision(thinker: &Value, Preprocessors { pictures, videos }: &Preprocessors) -> Result<Vision, ConfigProblem> {
    let keys = Keys(&thinker["vision_config"]);
    keys.check_against(&[VISION, COMMON])?;
    keys.must_be("hidden_act", "gelu_pytorch_tanh")?;
    if keys.boolean("apply_vit_abs_pos_embed")? == Some(false) {
        return Err(wrong("apply_vit_abs_pos_embed", "true"));
    }
    for name in ["in_channels", "in_chans"] {
        if keys.optional_integer(name)?.is_some_and(|channels| channels != CHANNELS) {
            return Err(wrong(name, "3"));
        }
    }
    let places = keys.integer("num_position_embeddings")?;
    let side = places.isqrt();
    if side * side != places {
        return Err(wrong("num_position_embeddings", "a square"));
    }
    let deepstack = keys.list("deepstack_visual_indexes")?;
    let outer = Keys(thinker);
    // Two spellings of the least and the greatest number of pixels.
    let limit =
        |json: &Value, name: &str, edge: &str| Ok(Keys(json).optional_integer(name)?.or(Keys(&json["size"]).optional_integer(edge)?));
    let least = |json: &Value| limit(json, "min_pixels", "shortest_edge");
    let most = |json: &Value| limit(json, "max_pixels", "longest_edge");
    let vision = Vision {
        layers: keys.integer("depth")?,
        hidden_size: keys.integer("hidden_size")?,
        heads: keys.integer("num_heads")?,
        width: keys.integer("intermediate_size")?,
        patch: keys.integer("patch_size")?,
        merge: keys.integer("spatial_merge_size")?,
        frames: keys.integer("temporal_patch_size")?,
        side,
        out: keys.integer("out_hidden_size")?,
        deepstack,
        image_token: outer.integer("image_token_id")?,
        video_token: outer.integer("video_token_id")?,
        start_token: outer.integer("vision_start_token_id")?,
        end_token: outer.integer("vision_end_token_id")?,
        positions_per_second: outer.integer("position_id_per_seconds")?,
        pixels_min: least(pictures)?.unwrap_or(PIXELS_MIN),
        pixels_max: most(pictures)?.unwrap_or(PIXELS_MAX),
        frame_pixels_min: least(videos)?.unwrap_or(FRAME_PIXELS[0]),
        frame_pixels_max: most(videos)?.unwrap_or(FRAME_PIXELS[1]),
    };
    for (name, value) in [("patch_size", vision.patch), ("merge_size", vision.merge), ("temporal_patch_size", vision.frames)] {
        must_agree(pictures, name, value)?;
        must_agree(videos, name, value)?;
    }
    // The resize and the order of patches are those of pairs of frames and of squares of four patches.
    if (vision.merge, vision.frames) != (2, 2) {
        return Err(wrong("spatial_merge_size and temporal_patch_size", "2"));
    }
    Ok(vision)
}

fn audio(thinker: &Value, preprocessor: &Value) -> Result<Audio, ConfigProblem> {
    let keys = Keys(&thinker["audio_config"]);
    keys.check_against(&[AUDIO, COMMON])?;
    keys.must_be("activation_function", "gelu")?;
    let outer = Keys(thinker);
    let audio = Audio {
        layers: keys.integer("encoder_layers")?,
        hidden_size: keys.integer("d_model")?,
        heads: keys.integer("encoder_attention_heads")?,
        width: keys.integer("encoder_ffn_dim")?,
        bands: keys.integer("num_mel_bins")?,
        channels: keys.integer("downsample_hidden_size")?,
        chunk: keys.integer("n_window")?.saturating_mul(2),
        window: keys.integer("n_window_infer")?,
        out: keys.integer("output_dim")?,
        token: outer.integer("audio_token_id")?,
        start_token: outer.integer("audio_start_token_id")?,
        end_token: outer.integer("audio_end_token_id")?,
    };
    must_agree(preprocessor, "feature_size", audio.bands)?;
    Ok(audio)
}

/// Talker, code predictor and wave decoder.
fn speaking_parts(json: &Value) -> Result<[PartConfig; 3], ConfigProblem> {
    let talker = talker(json).map_err(|problem| within("talker_config", &problem))?;
    let predictor = code_predictor(&json["talker_config"]["code_predictor_config"]);
    let predictor = predictor.map_err(|problem| within("talker_config: code_predictor_config", &problem))?;
    let wave = code_to_wave(&json["code2wav_config"]).map_err(|problem| within("code2wav_config", &problem))?;
    if talker.groups != predictor.groups || wave.books != talker.groups {
        return Err(wrong("num_code_groups", "the same in talker, code predictor and wave decoder"));
    }
    Ok([PartConfig::Talker(talker), PartConfig::CodePredictor(predictor), PartConfig::CodeToWave(wave)])
}

fn talker(json: &Value) -> Result<Talker, ConfigProblem> {
    let (outer, inner) = (Keys(json), &json["talker_config"]);
    let (keys, text) = (Keys(inner), Keys(&inner["text_config"]));
    keys.check_against(&[TALKER, COMMON])?;
    text.check(TALKER_TEXT)?;
    let shared = SharedExpert::Gated { width: text.integer("shared_expert_intermediate_size")? };
    let moe = text.moe("moe_intermediate_size", text.normalises()?, shared)?;
    let speakers = inner["speaker_id"].as_object().ok_or_else(|| wrong("speaker_id", "there"))?;
    let mut named = Vec::new();
    for name in speakers.keys() {
        named.push((name.clone(), Keys(&inner["speaker_id"]).integer(name)?));
    }
    named.sort();
    Ok(Talker {
        decoder: decoder_of(text, &text.attention(QkNorm::PerHead, QkvBias::None)?, text.sparse_or_dense(&moe)?)?,
        width: text.integer("intermediate_size")?,
        thinker_hidden_size: keys.integer("thinker_hidden_size")?,
        accept_layers: keys.integer("accept_hidden_layer")?,
        groups: keys.integer("num_code_groups")?,
        codes: TalkerCodes {
            pad: keys.integer("codec_pad_id")?,
            begin: keys.integer("codec_bos_id")?,
            end: keys.integer("codec_eos_token_id")?,
            no_think: keys.integer("codec_nothink_id")?,
            think_begin: keys.integer("codec_think_bos_id")?,
            think_end: keys.integer("codec_think_eos_id")?,
        },
        tokens: TalkerTokens {
            message_begin: outer.integer("im_start_token_id")?,
            message_end: outer.integer("im_end_token_id")?,
            system: outer.integer("system_token_id")?,
            user: outer.integer("user_token_id")?,
            assistant: outer.integer("assistant_token_id")?,
            pad: outer.integer("tts_pad_token_id")?,
            begin: outer.integer("tts_bos_token_id")?,
            end: outer.integer("tts_eos_token_id")?,
        },
        speakers: named,
    })
}

fn code_predictor(json: &Value) -> Result<CodePredictor, ConfigProblem> {
    let keys = Keys(json);
    keys.check(CODE_PREDICTOR)?;
    let all_look_back = |types: &Vec<Value>| types.iter().all(|kind| kind == "full_attention");
    if !(json["layer_types"].is_null() || json["layer_types"].as_array().is_some_and(all_look_back)) {
        return Err(wrong("layer_types", "full_attention in all layers"));
    }
    let layers = keys.integer("num_hidden_layers")?.min(protocol::decoder::LAYERS_MAX + 1);
    let dense = FeedForward::Dense { width: keys.integer("intermediate_size")?, activation: keys.activation()? };
    let attention = keys.attention(QkNorm::PerHead, QkvBias::None)?;
    let decoder = decoder_of(keys, &attention, vec![dense; layers as usize])?;
    let decoder = protocol::Decoder { embedding: Embedding::Elsewhere, head: Head::Elsewhere, ..decoder };
    Ok(CodePredictor { decoder, groups: keys.integer("num_code_groups")? })
}

fn code_to_wave(json: &Value) -> Result<CodeToWave, ConfigProblem> {
    let keys = Keys(json);
    keys.check(CODE_TO_WAVE)?;
    keys.activation()?;
    Ok(CodeToWave {
        layers: keys.integer("num_hidden_layers")?,
        hidden_size: keys.integer("hidden_size")?,
        heads: keys.integer("num_attention_heads")?,
        kv_heads: keys.integer("num_key_value_heads")?,
        width: keys.integer("intermediate_size")?,
        window: keys.integer("sliding_window")?,
        rope_base: keys.rope()?.base(),
        eps: keys.number("rms_norm_eps")?,
        books: keys.integer("num_quantizers")?,
        codes: keys.integer("codebook_size")?,
        channels: keys.integer("decoder_dim")?,
        upsampling: keys.list("upsampling_ratios")?,
        rates: keys.list("upsample_rates")?,
    })
}

fn of(part: PartKind, name: &str) -> Name<'_> {
    Name::Usual(part, Cow::Borrowed(name))
}

fn name_in_whole(name: &str) -> Name<'_> {
    match name.split_once('.') {
        Some(("thinker", rest)) => name_in_thinker(rest),
        Some(("talker", "codec_head.weight")) => of(PartKind::Talker, "lm_head.weight"),
        Some(("talker", "model.codec_embedding.weight")) => of(PartKind::Talker, "model.embed_tokens.weight"),
        Some(("talker", "lm_head.weight" | "model.embed_tokens.weight")) => Name::Unexpected,
        Some(("talker", rest)) => match rest.strip_prefix("code_predictor.") {
            Some(rest) => of(PartKind::CodePredictor, rest),
            None => of(PartKind::Talker, rest),
        },
        Some(("code2wav", rest)) => of(PartKind::CodeToWave, rest),
        _ => Name::Unexpected,
    }
}

fn name_in_thinker(name: &str) -> Name<'_> {
    match name.split_once('.') {
        Some(("visual", rest)) => of(PartKind::Vision, rest),
        Some(("audio_tower", rest)) => of(PartKind::Audio, rest),
        _ => usual_name(name),
    }
}

fn spell_in_whole(part: PartKind, usual: &str) -> String {
    match (part, usual) {
        (PartKind::Talker, "lm_head.weight") => "talker.codec_head.weight".to_owned(),
        (PartKind::Talker, "model.embed_tokens.weight") => "talker.model.codec_embedding.weight".to_owned(),
        (PartKind::Talker, usual) => format!("talker.{usual}"),
        (PartKind::CodePredictor, usual) => format!("talker.code_predictor.{usual}"),
        (PartKind::CodeToWave, usual) => format!("code2wav.{usual}"),
        (part, usual) => format!("thinker.{}", spell_in_thinker(part, usual)),
    }
}

fn spell_in_thinker(part: PartKind, usual: &str) -> String {
    match part {
        PartKind::Vision => format!("visual.{usual}"),
        PartKind::Audio => format!("audio_tower.{usual}"),
        _ => usual.to_owned(),
    }
}
