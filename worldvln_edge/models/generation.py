"""Generation of latent clips in PyTorch: the plain loop that exports, rollouts and tests are measured against.

Legend: R rows (conditional, unconditional), L tokens, C width, c latent channels, T latent frames, H W latent grid,
d bits per token. Bits are bool [1,T,h,w,d], indexed by real scale id.
Source: spec/world_model.md 4 (text rows), 6 (loop), 9.1 a-c (work that is left out because nobody reads its result).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldvln_edge.config import ConfigError, GenerationConfig
from worldvln_edge.models.guidance import adaptive_projected_guidance
from worldvln_edge.models.key_values import ReferenceKV
from worldvln_edge.models.quantizer import add_codes, bits_per_token, step_input, tokens_of_latents
from worldvln_edge.models.world_model import LayerKV, WorldModel
from worldvln_edge.noise import step_uniforms
from worldvln_edge.rope import text_rope, visual_rope
from worldvln_edge.scale_schedule import ScaleSchedule, ScaleStep

Guide = Callable[[Tensor, Tensor], Tensor]
"""(conditional, unconditional) logits [1,L,d,2], divided by the temperature -> guided logits of the same shape."""


@dataclass(frozen=True, kw_only=True)
class TextCondition:
    """Projected text of one instruction."""

    rows_RLC: Tensor
    """[2,L,C] conditional and unconditional, or [1,L,C] when nothing is guided."""

    @classmethod
    @torch.no_grad()
    def build(
        cls, model: WorldModel, prompt_Lt: Tensor, negative_Lt: Tensor | None = None, guided: bool = True
    ) -> "TextCondition":
        """Project text features into rows (4).

        Args:
            model: gives the projection and `cfg_uncond`.
            prompt_Lt: float [L, text_channels] text features of the tagged instruction.
            negative_Lt: features of a negative prompt, or None for the learned `cfg_uncond[:L]`. A shorter one is
                followed by zero rows, which are attended; of a longer one the first L rows are used.
            guided: False (cfg = 1) builds the conditional row only.

        Raises:
            ConfigError: no tokens, more than `text_max_tokens`, or another channel count.
        """
        config, tokens = model.config, prompt_Lt.shape[0]
        for name, features in (("prompt", prompt_Lt), ("negative prompt", negative_Lt)):
            if features is not None and (features.ndim != 2 or features.shape[1] != config.text_channels):
                raise ConfigError(
                    f"{name} features must be [tokens, {config.text_channels}], found {list(features.shape)}"
                )
        if not 1 <= tokens <= config.text_max_tokens:
            raise ConfigError(f"the prompt must have 1..{config.text_max_tokens} tokens, found {tokens}")
        device = model.cfg_uncond.device
        rows = [model.project_text(prompt_Lt.to(device)[None])]
        if guided:
            if negative_Lt is None:
                negative_Lt = model.cfg_uncond[:tokens]
            elif negative_Lt.shape[0] > tokens:
                warnings.warn(
                    f"the negative prompt has {negative_Lt.shape[0]} tokens, the prompt {tokens}; "
                    f"only the first {tokens} are used",
                    stacklevel=2,
                )
                negative_Lt = negative_Lt[:tokens]
            projected = model.project_text(negative_Lt.to(device)[None])
            rows.append(F.pad(projected, (0, 0, 0, tokens - projected.shape[1])))
        return cls(rows_RLC=torch.cat(rows))

    @torch.no_grad()
    def key_values(self, model: WorldModel) -> ReferenceKV:
        """One pass over the text tokens; the result starts a generation and may be reused for every segment."""
        rope = text_rope(self.rows_RLC.shape[1], model.config.head_dim)
        _, own = model.forward_blocks(self.rows_RLC, torch.from_numpy(rope).to(self.rows_RLC.device))
        return ReferenceKV(own)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What went through one step. All tensors are detached."""

    step: ScaleStep
    input_BcTHW: Tensor
    """float32 [1,c,T,h,w]: latent input before embedding."""
    hidden_RLC: Tensor
    """[R,L,C]: output of the last block, before the final norm."""
    logits_RLd2: Tensor
    """float32 [R,L,d,2], before the temperature."""
    guided_BLd2: Tensor
    """float32 [1,L,d,2], after temperature and guidance."""
    bits_BThwd: Tensor
    """bool [1,T,h,w,d]: bits used, forced or drawn."""
    summed_BcTHW: Tensor
    """float32 [1,c,T,H,W]: summed codes after the step."""
    kv_shapes: dict[str, tuple[int, ...]]
    """Key shapes held after the step, see `ReferenceKV.shapes`."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Result of a generation. `records` is empty unless asked for."""

    summed_BcTHW: Tensor
    """float32 [1,c,T,H,W]: summed codes; input of the VAE decoder."""
    bits: list[Tensor]
    """bool [1,T,h,w,d] per step, in order."""
    records: list[StepRecord]


@torch.no_grad()
def generate(
    model: WorldModel,
    schedule: ScaleSchedule,
    text: TextCondition,
    config: GenerationConfig,
    seed: int,
    forced_bits: Sequence[Tensor] | None = None,
    leak: int | None = None,
    record: bool = False,
    guide: Guide | None = None,
) -> Generated:
    """Generate all clips of a schedule.

    Args:
        model: the world model; its device and dtypes are used.
        schedule: schedule of the whole horizon.
        text: rows of the instruction.
        config: temperatures and guidance.
        seed: any integer; a drawn bit depends on (seed, clip, step, position) and the logits only.
        forced_bits: observed bits by real scale id, bool [1,T,h,w,d]; may end after the last leaked step.
        leak: the first `leak` scales (counted over all clips) take forced bits instead of drawn ones. None: as many
            steps as `forced_bits` holds.
        record: also run and return what is not needed (logits of leaked steps, unread repetitions).
        guide: replaces APG, e.g. by plain CFG; ignored with one row.

    Raises:
        ConfigError: text rows do not fit `config.cfg`, or forced bits are missing or have another shape.
    """
    kv = text.key_values(model)
    forced = _forced_by_step(schedule, forced_bits, leak)
    parts = []
    for clip in schedule.clips:
        kv.drop_unused(schedule, clip.index)
        keep = schedule.scales_referred_to(clip.index)
        parts.append(generate_clip(model, schedule, clip.index, kv, config, seed, forced, keep, record, guide))
    return Generated(
        summed_BcTHW=torch.cat([part.summed_BcTHW for part in parts], 2),
        bits=[bits for part in parts for bits in part.bits],
        records=[entry for part in parts for entry in part.records],
    )


@torch.no_grad()
def generate_clip(
    model: WorldModel,
    schedule: ScaleSchedule,
    clip_index: int,
    kv: ReferenceKV,
    config: GenerationConfig,
    seed: int,
    forced_bits: dict[int, Tensor] | None = None,
    keep: Sequence[int] = (),
    record: bool = False,
    guide: Guide | None = None,
) -> Generated:
    """Generate (or, with all bits forced, observe) one clip. Args and errors as `generate`, except:

    Args:
        clip_index: which clip of the schedule.
        kv: text and everything the clip refers to; the kept scales are stored into it.
        forced_bits: real scale id -> observed bits; steps without an entry are drawn.
        keep: scales of this clip whose keys and values later clips need.

    Raises:
        MissingReferenceError: the clip refers to a scale that `kv` does not hold.
    """
    clip, device = schedule.clips[clip_index], model.cfg_uncond.device
    if kv.rows != (1 if config.cfg == 1 else 2):
        raise ConfigError(f"cfg {config.cfg} needs {1 if config.cfg == 1 else 2} text rows, the text has {kv.rows}")
    tau = config.tau_image if clip.index == 0 else config.tau_video
    summed = torch.zeros(1, model.config.latent_channels, *clip.steps[-1].thw, device=device)
    forced_bits = forced_bits or {}
    own_references = {
        s for step in clip.steps for c, s in schedule.references_of_scale(clip_index, step.scale) if c == clip_index
    }
    used_bits: list[Tensor] = []
    records: list[StepRecord] = []
    for step in clip.steps:
        bits = _checked_bits(forced_bits.get(step.real_scale_id), step, model)
        kept = step.is_last_repetition and (step.scale in keep or step.scale in own_references)
        latents = step_input(summed, step)
        # A forced step matters only through the keys and values it leaves behind (9.1 a-c).
        if record or kept or bits is None:
            references = schedule.references_of_scale(clip_index, step.scale)
            hidden, own = _run_step(model, schedule, step, latents, kv, references)
            if kept:
                kv.keep((clip_index, step.scale), own)
            if record or bits is None:
                logits = model.logits(hidden, step.is_semantic)
                guided = _guide(logits / tau, config, guide)
                if bits is None:
                    bits = _draw(guided, step, seed)
        bits = bits.to(device)
        summed = add_codes(summed, bits)
        used_bits.append(bits)
        if record:
            records.append(
                StepRecord(
                    step=step,
                    input_BcTHW=latents,
                    hidden_RLC=hidden,
                    logits_RLd2=logits,
                    guided_BLd2=guided,
                    bits_BThwd=bits,
                    summed_BcTHW=summed,
                    kv_shapes=kv.shapes(),
                )
            )
    return Generated(summed_BcTHW=summed, bits=used_bits, records=records)


def _run_step(
    model: WorldModel,
    schedule: ScaleSchedule,
    step: ScaleStep,
    latents_BcThw: Tensor,
    kv: ReferenceKV,
    references: tuple[tuple[int, int], ...],
) -> tuple[Tensor, list[LayerKV]]:
    config, first_frame = model.config, schedule.clips[step.clip].first_frame
    rope = visual_rope(step, first_frame, schedule.config.latent_hw, config.text_max_tokens, config.head_dim)
    x_BLC = model.embed_latents(tokens_of_latents(latents_BcThw)).expand(kv.rows, -1, -1)
    return model.forward_blocks(x_BLC, torch.from_numpy(rope).to(x_BLC.device), kv.context(references))


def _guide(logits_RLd2: Tensor, config: GenerationConfig, guide: Guide | None) -> Tensor:
    conditional = logits_RLd2[:1]
    if logits_RLd2.shape[0] == 1:
        return conditional
    if guide is not None:
        return guide(conditional, logits_RLd2[1:])
    return adaptive_projected_guidance(
        conditional, logits_RLd2[1:], config.cfg, config.apg_norm_threshold, config.apg_eta
    )


def _draw(guided_BLd2: Tensor, step: ScaleStep, seed: int) -> Tensor:
    bits = guided_BLd2.shape[2]
    uniforms = torch.from_numpy(step_uniforms(seed, step.clip, step.step_in_clip, step.thw, bits))
    probability = torch.sigmoid(guided_BLd2[..., 1] - guided_BLd2[..., 0])
    return uniforms.to(probability.device)[None] < probability.reshape(1, *step.thw, bits)


def _forced_by_step(
    schedule: ScaleSchedule, forced_bits: Sequence[Tensor] | None, leak: int | None
) -> dict[int, Tensor]:
    given = forced_bits or ()
    if leak is None:
        return dict(enumerate(given))
    scales = schedule.config.scales_per_clip
    leaked = [step.real_scale_id for step in schedule.steps() if step.clip * scales + step.scale < leak]
    if len(leaked) > len(given):
        raise ConfigError(f"leak of {leak} scales needs the bits of {len(leaked)} steps, found {len(given)}")
    return {index: given[index] for index in leaked}


def _checked_bits(bits: Tensor | None, step: ScaleStep, model: WorldModel) -> Tensor | None:
    shape = (1, *step.thw, bits_per_token(step, model.config))
    if bits is not None and (tuple(bits.shape) != shape or bits.dtype != torch.bool):
        raise ConfigError(
            f"forced bits of clip {step.clip} scale {step.scale} repetition {step.repetition} must be bool "
            f"{list(shape)}, found {bits.dtype} {list(bits.shape)}"
        )
    return bits
