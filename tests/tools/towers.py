"""The published towers of Qwen3-Omni in PyTorch, on random weights: python towers.py [f32|bf16] (needs torch and transformers 5). `bench towers` is its other side."""
import statistics
import sys
import time

import torch
from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as C
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as M

torch.set_num_threads(2)
torch.cuda.is_current_stream_capturing = lambda: False
kind = {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1] if len(sys.argv) > 1 else "f32"]
vision = C.Qwen3OmniMoeVisionEncoderConfig(
    depth=27, hidden_size=1152, num_heads=16, intermediate_size=4304, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=2304,
    out_hidden_size=2048, deepstack_visual_indexes=[8, 16, 24], hidden_act="gelu_pytorch_tanh", attn_implementation="sdpa",
)
audio = C.Qwen3OmniMoeAudioEncoderConfig(
    d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128, downsample_hidden_size=480, n_window=50, n_window_infer=800,
    output_dim=2048, conv_chunksize=500, attn_implementation="sdpa",
)
eyes = M.Qwen3OmniMoeVisionEncoder._from_config(vision).to(kind).eval()
ears = M.Qwen3OmniMoeAudioEncoder._from_config(audio).to(kind).eval()


def measure(what, run, runs=3):
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        with torch.inference_mode():
            run()
        seconds.append(time.perf_counter() - began)
    print(f"{what:<22}{statistics.median(seconds[1:]):10.3f} s", flush=True)


for width, height in [(448, 448), (1344, 1008)]:
    h, w = round(height / 32) * 2, round(width / 32) * 2
    patches, grid = torch.randn(h * w, 1536, dtype=kind), torch.tensor([[1, h, w]])
    measure(f"picture of {width} x {height}", lambda: eyes(patches, grid_thw=grid))
for seconds in (30, 300):
    frames = torch.randn(128, 100 * seconds, dtype=kind)
    measure(f"sound of {seconds} s", lambda: ears(frames, feature_lens=torch.tensor([100 * seconds])))
