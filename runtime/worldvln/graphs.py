"""Names of the graphs in a bundle and of their inputs and outputs: what export writes and the runtime binds.

Legend: B guidance rows, n tokens of a step = T*h*w, C width, D latent channels, H W latent rows and columns,
bits = semantic_bits + detail_bits, L text tokens, F frames, N patch tokens.

| graph                     | inputs -> outputs                                                                   |
|---------------------------|-------------------------------------------------------------------------------------|
| text_encoder              | ids [1,L] -> text_embeds [1,L,C], uncond_embeds [1,L,C]                             |
| latent_embed              | latents [B,n,D] -> embeds [B,n,C]                                                   |
| world_model_context       | embeds [B,n,C], rope [2,n,hd/2], write_index [B], kv_length [B], caches -> caches   |
| world_model_step          | see `STEP_INPUTS`; caches -> next_codes [1,D,T,H,W], bits, probabilities [T,h,w,bits]|
| vae_encoder_{first,next}  | frames [1,3,F,h,w] (and state_i) -> latents [1,D,T,H,W], next_state_i               |
| vae_decoder_{first,next}  | codes [1,D,T,H,W] (and state_i) -> features [1,Cf,F,h,w], next_state_i              |
| vae_pixels_{first,next}   | features, codes (and state_i) -> pixels [1,3,F,h,w], next_state_i                   |
| action_adapter            | features [1,Cf,F,h,w] -> tokens [F,N,Ch]                                            |
| action_head               | tokens [F,N,Ch] -> logits [F-window+1, 6*(window-1)]                                |
| rgb_head                  | images [F,3,h,w] -> logits                                                          |

Caches are `past_key_i`, `past_value_i` -> `present_key_i`, `present_value_i`, [B, kv_heads, capacity, hd], one pair a
layer, written in place.
"""

GUIDANCE_ROWS = "guidance_rows"
"""Name of the size B where it is open: a scale without guidance runs with the instruction's row alone."""

TEXT_ENCODER = "text_encoder"
LATENT_EMBED = "latent_embed"
WORLD_MODEL_CONTEXT = "world_model_context"
WORLD_MODEL_STEP = "world_model_step"
VAE_ENCODER = "vae_encoder"
VAE_DECODER = "vae_decoder"
VAE_PIXELS = "vae_pixels"
ACTION_ADAPTER = "action_adapter"
ACTION_HEAD = "action_head"
RGB_HEAD = "rgb_head"

STEP_INPUTS = (
    "codes",  # [1,D,T,H,W] sum of the codes so far
    "area_h",  # [h,H] area resize of rows
    "area_w",  # [w,W]
    "up_channels",  # [D,bits] linear resize of channels; zero columns for the bits of the other head
    "up_h",  # [H,h]
    "up_w",  # [W,w]
    "bit_mask",  # [bits] 1 for the bits of this scale's head
    "code_value",  # [] 1/sqrt(bits of this scale)
    "inverse_tau",  # []
    "guidance",  # []
    "uniforms",  # [T,h,w,bits]
    "forced_bits",  # [T,h,w,bits] 0/1, used where force is 1
    "force",  # [] 0 or 1
    "rope",  # [2,T,h,w,hd/2]
    "write_index",
    "kv_length",
)


def first_or_next(stem: str, is_first: bool) -> str:
    """Graph of a streaming VAE part: `_first` for the call that holds the first frame, `_next` for all later ones."""
    return f"{stem}_first" if is_first else f"{stem}_next"


def cache_stems(layers: int) -> list[str]:
    """Stems of the in-place caches in the order of `KVCache.buffers[layer, 0 or 1]`."""
    return [f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]
