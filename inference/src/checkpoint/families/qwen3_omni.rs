//! Qwen3-Omni: its thinker, alone (`Qwen3OmniMoeThinkerForConditionalGeneration`) or in the whole model
//! (`Qwen3OmniMoeForConditionalGeneration`).

use super::keys::{Key, KeyTable};
use super::qwen3_moe::{KEYS, decoder};
use super::{Family, Name, Wrapper, usual_name};

pub(super) const QWEN3_OMNI: Family = Family {
    model_type: "qwen3_omni_moe",
    wrappers: &[Wrapper { inner: "thinker_config", keys: WHOLE }, Wrapper { inner: "text_config", keys: THINKER }],
    keys: KEYS,
    decoder,
    name: name_in_whole,
};

pub(super) const QWEN3_OMNI_THINKER: Family = Family {
    model_type: "qwen3_omni_moe_thinker",
    wrappers: &[Wrapper { inner: "text_config", keys: THINKER }],
    keys: KEYS,
    decoder,
    name: name_in_thinker,
};

const WHOLE: KeyTable = &[
    ("assistant_token_id", Key::Ignored("of use to the talker alone")),
    ("code2wav_config", Key::Ignored("the wave decoder is left out")),
    ("enable_audio_output", Key::Ignored("the talker is left out")),
    ("im_end_token_id", Key::Ignored("of use to the talker alone")),
    ("im_start_token_id", Key::Ignored("of use to the talker alone")),
    ("system_token_id", Key::Ignored("of use to the talker alone")),
    ("talker_config", Key::Ignored("the talker is left out")),
    ("thinker_config", Key::Read),
    ("tts_bos_token_id", Key::Ignored("of use to the talker alone")),
    ("tts_eos_token_id", Key::Ignored("of use to the talker alone")),
    ("tts_pad_token_id", Key::Ignored("of use to the talker alone")),
    ("user_token_id", Key::Ignored("of use to the talker alone")),
];

const THINKER: KeyTable = &[
    ("audio_config", Key::Ignored("the audio tower is left out")),
    ("audio_end_token_id", Key::Ignored("the audio tower is left out")),
    ("audio_start_token_id", Key::Ignored("the audio tower is left out")),
    ("audio_token_id", Key::Ignored("the audio tower is left out")),
    ("image_token_id", Key::Ignored("the vision tower is left out")),
    ("position_id_per_seconds", Key::Ignored("the towers are left out")),
    ("seconds_per_chunk", Key::Ignored("the towers are left out")),
    ("text_config", Key::Read),
    ("user_token_id", Key::Ignored("of use to the talker alone")),
    ("video_token_id", Key::Ignored("the vision tower is left out")),
    ("vision_config", Key::Ignored("the vision tower is left out")),
    ("vision_end_token_id", Key::Ignored("the vision tower is left out")),
    ("vision_start_token_id", Key::Ignored("the vision tower is left out")),
];

fn name_in_whole(name: &str) -> Name<'_> {
    match name.split_once('.') {
        Some(("thinker", rest)) => name_in_thinker(rest),
        Some(("talker", _)) => Name::Skipped("talker"),
        Some(("code2wav", _)) => Name::Skipped("code2wav"),
        _ => Name::Unexpected,
    }
}

fn name_in_thinker(name: &str) -> Name<'_> {
    match name.split_once('.') {
        Some(("visual", _)) => Name::Skipped("vision tower"),
        Some(("audio_tower", _)) => Name::Skipped("audio tower"),
        _ => usual_name(name),
    }
}
