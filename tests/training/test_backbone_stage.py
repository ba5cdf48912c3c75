"""The backbone as a stage: what a micro-batch holds and costs, and that it depends on seed, epoch and rows only."""

import math
from collections import Counter

import msgspec
import pytest
import torch
from backbone_stages import CONFIG, EXACT, FRAMES, INSTRUCTIONS, TOKENIZER, MixedFlights, make_stage, mean_loss
from small_models import random_model, tiny_config
from torch.utils.data import DataLoader

from worldvln_edge.config import ConfigError
from worldvln_edge.models.attention_mask import all_scales
from worldvln_edge.models.quantizer import SelfCorrection, encode_for_training
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.backbone import visual_hidden
from worldvln_edge.training.stages.backbone_rows import BackboneDataError, CachedFlights, LatentSet
from worldvln_edge.training.stages.backbone_stage import BackboneConfig, BackboneStage
from worldvln_edge.training.stages.bit_loss import scale_weight, token_losses
from worldvln_edge.training.stages.lora import LoraConfig
from worldvln_edge.training.trainer.stage import row_generator

PACKED = msgspec.structs.replace(EXACT, packed_tokens=120)


def plain_loss(stage: BackboneStage, model, rows: list[int]) -> float:
    """Row by row, scale by scale, as the formulas read."""
    total = weights = 0.0
    flights = MixedFlights()
    for row in rows:
        schedule = ScaleSchedule(CONFIG.schedule, FRAMES[row])
        generator = row_generator(0, 0, row)
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        corruption = SelfCorrection(schedule, 0.0, own)
        scales = [
            scale
            for clip in schedule.clips
            for scale in encode_for_training(
                flights.latents(row)[None, :, clip.frame_slice], clip, CONFIG.world_model, corruption
            )
        ]
        frames = (FRAMES[row] - 1) * CONFIG.video_vae.temporal_stride + 1
        ids = torch.from_numpy(TOKENIZER.encode(tagged_prompt(INSTRUCTIONS[row], CONFIG.horizon, frames)))[None]
        hidden = visual_hidden(model.world_model, schedule, scales, model.text_encoder(ids), [ids.shape[1]])
        last = schedule.last_step(len(schedule.clips) - 1, 2).tokens
        for scale, part in zip(scales, hidden.split([s.input_BLC.shape[1] for s in scales], 1), strict=True):
            logits = model.world_model.logits(part, scale.scale < CONFIG.schedule.semantic_scales)
            tokens = part.shape[1]
            weight = scale_weight(tokens, last, stage.config.scale_reweight, stage.config.scale_weight_limit)
            weight *= stage.config.image_clip_weight if scale.clip == 0 else 1.0
            total += weight * float(token_losses(logits, scale.label_bits_BLd).mean())
            weights += weight
    return total / weights


@pytest.mark.parametrize("image_weight", [1.0, 0.2])
@pytest.mark.parametrize("config", [EXACT, PACKED], ids=["side by side", "packed"])
def test_the_loss_is_what_the_formulas_say_row_by_row(config: BackboneConfig, image_weight: float):
    model = random_model(CONFIG)
    stage = make_stage(msgspec.structs.replace(config, image_clip_weight=image_weight), model=model)
    rows = [1, 3, 4]
    with torch.no_grad():
        assert mean_loss(stage, rows) == pytest.approx(plain_loss(stage, model, rows), rel=1e-5)


def test_packed_rows_train_as_rows_side_by_side():
    model = random_model(CONFIG)
    side_by_side, packed = make_stage(model=model), make_stage(PACKED, model=model)
    losses, gradients = [], []
    for stage in (side_by_side, packed):
        batch = stage.load(0, [1, 3, 4])
        stage.network.zero_grad()
        (stage.totals(batch)["loss"] / stage.weights(batch)["loss"]).backward()
        losses.append(mean_loss(stage, [1, 3, 4]))
        gradients.append({name: p.grad for name, p in stage.network.named_parameters() if p.grad is not None})
    assert packed.load(0, [1, 3, 4]).latents_BVC.shape[0] == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # Elements are sums that may nearly cancel, so rounding is judged by the size of the whole parameter.
        assert float((gradients[1][name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def test_micro_batches_add_up():
    stage = make_stage(BackboneConfig())
    whole = stage.load(2, [0, 1, 3])
    parts = [stage.load(2, rows) for rows in ([0], [1, 3])]
    weights: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    with torch.no_grad():
        for part in parts:
            weights.update(stage.weights(part))
            totals.update({name: float(total) for name, total in stage.totals(part).items()})
        expected = {name: float(total) for name, total in stage.totals(whole).items()}
    assert stage.weights(whole) == pytest.approx(dict(weights))
    assert expected == pytest.approx(dict(totals), rel=1e-4)
    assert expected.keys() == stage.weights(whole).keys()
    assert expected["padding"] == whole.mask.documents_BL.numel() - stage.tokens(whole)


def test_draws_of_a_row_do_not_depend_on_its_batch():
    config = BackboneConfig(flip_strength=0.3, condition_drop=0.5)
    stage = make_stage(config)
    alone, together = stage.load(3, [2]), stage.load(3, [0, 2, 5])
    tokens = alone.latents_BVC.shape[1]
    torch.testing.assert_close(alone.latents_BVC[0], together.latents_BVC[1, :tokens])
    for head in ("semantic", "detail"):
        members = getattr(together, head).row_N == 1
        assert torch.equal(getattr(alone, head).bits_Nd, getattr(together, head).bits_Nd[members])
    assert torch.equal(alone.rope_B2Ln[0, :, :tokens], together.rope_B2Ln[1, :, :tokens])
    assert bool(alone.unconditional_R[0]) == bool(together.unconditional_R[1])


def test_draws_differ_between_epochs_and_seeds():
    config = BackboneConfig(flip_strength=0.3)
    first = make_stage(config).load(0, [0]).latents_BVC
    assert torch.equal(first, make_stage(config).load(0, [0]).latents_BVC)
    assert not torch.equal(first, make_stage(config).load(1, [0]).latents_BVC)
    assert not torch.equal(first, make_stage(config, seed=1).load(0, [0]).latents_BVC)


def test_flips_may_differ_from_scale_to_scale():
    """Flipping nothing but the first scale of the image shows from the second scale of the image on."""
    once = tiny_config(repetitions=1)
    exact, flipped = (
        make_stage(msgspec.structs.replace(EXACT, flip_strength=strength), model_config=once)
        for strength in (0.0, (1.0, *[0.0] * 11))
    )
    differs = torch.stack(
        [
            exact.load(epoch, [0]).latents_BVC[0].ne(flipped.load(epoch, [0]).latents_BVC[0]).any(-1)
            for epoch in range(9)
        ]
    ).any(0)
    assert differs.nonzero().flatten().tolist() == list(range(1, 9))
    with pytest.raises(ConfigError, match=r"one number per scale \(12\), found 2"):
        make_stage(BackboneConfig(flip_strength=(0.1, 0.1))).load(0, [0])


def test_worker_processes_make_the_same_batches():
    stage = make_stage(BackboneConfig())
    rows = [[0, 1], [2, 3]]

    def load(at: list[int]):
        return stage.load(0, at)

    loader = DataLoader(rows, batch_size=None, num_workers=1, collate_fn=load)  # type: ignore[arg-type]
    for batch, at in zip(loader, rows, strict=True):
        expected = load(at)
        assert torch.equal(batch.latents_BVC, expected.latents_BVC)
        assert torch.equal(batch.detail.bits_Nd, expected.detail.bits_Nd)
        assert batch.text_lengths == expected.text_lengths


def test_every_row_comes_once_an_epoch():
    config = msgspec.structs.replace(EXACT, step_rows=4, micro_rows=3)
    plan = make_stage(config).plan(0)
    assert [[len(rows) for rows in step] for step in plan] == [[3, 1], [2]]
    packed_stage = make_stage(msgspec.structs.replace(PACKED, step_sequences=2))
    packed = packed_stage.plan(0)
    for found in (plan, packed):
        assert sorted(row for step in found for rows in step for row in rows) == list(range(6))
    for step in packed:
        assert len(step) <= 2
        for rows in step:
            batch = packed_stage.load(0, rows)
            assert len(rows) == 1 or batch.used_tokens <= 120
    assert any(len(rows) > 1 for step in packed for rows in step)
    assert packed_stage.plan(1) != packed


def test_a_flight_that_is_too_long_trains_on_parts_of_it():
    stage = make_stage(msgspec.structs.replace(PACKED, packed_tokens=40, partial_scales={"c2-sem": 1, "image": 1}))
    schedule = ScaleSchedule(CONFIG.schedule, 7)
    expected = {((0, 2), (1, 2), (2, 0), (2, 1)), ((0, 0), (0, 1), (0, 2))}
    found = set()
    for epoch in range(20):
        batch = stage.load(epoch, [0])
        groups = torch.cat((batch.semantic.group_N, batch.detail.group_N)).unique().tolist()
        found.add(tuple(key for index, key in enumerate(all_scales(schedule)) if index in groups))
        assert batch.latents_BVC.shape[1] == len(batch.semantic.place_N) + len(batch.detail.place_N)
        assert math.isfinite(mean_loss(stage, [0], epoch))
    assert found == expected
    whole = stage.load(0, [4])  # one latent frame fits
    assert whole.latents_BVC.shape[1] == 1 + 2 + 6


def test_parts_are_encoded_as_in_the_whole_flight():
    part = make_stage(msgspec.structs.replace(PACKED, packed_tokens=40, partial_scales={"c2-sem": 1})).load(0, [0])
    whole = make_stage(msgspec.structs.replace(PACKED, packed_tokens=400)).load(0, [0])
    for head in ("semantic", "detail"):
        ours, theirs = getattr(part, head), getattr(whole, head)
        for group in ours.group_N.unique():
            assert torch.equal(ours.bits_Nd[ours.group_N == group], theirs.bits_Nd[theirs.group_N == group])
            torch.testing.assert_close(ours.weight_N[ours.group_N == group], theirs.weight_N[theirs.group_N == group])


def test_the_caption_matters_unless_it_is_dropped():
    model = random_model(CONFIG)
    losses = []
    for drop in (0.0, 1.0):
        for instruction in ("turn left", "fly back"):  # as many tokens
            flights = MixedFlights(frames=(5,), instructions=[instruction])
            losses.append(
                mean_loss(make_stage(msgspec.structs.replace(EXACT, condition_drop=drop), flights, model), [0])
            )
    told_left, told_back, *dropped = losses
    assert abs(told_left - told_back) > 1e-3
    assert dropped[0] == dropped[1]
    assert dropped[0] not in (told_left, told_back)


def test_captions_are_dropped_as_often_as_asked_for():
    stage = make_stage(msgspec.structs.replace(EXACT, condition_drop=0.1))
    dropped = [bool(stage.load(epoch, [4]).unconditional_R[0]) for epoch in range(400)]
    assert 20 < sum(dropped) < 65


def test_later_scales_never_change_what_is_said_before_them():
    """Training, as serving, goes from coarse to fine and from clip to clip."""
    stage = make_stage(msgspec.structs.replace(EXACT, pad_multiple=1))
    changed = MixedFlights()
    changed.tensors[0] = changed.tensors[0].clone()
    changed.tensors[0][:, 3:] += torch.randn(changed.tensors[0][:, 3:].shape)  # clips 2 and 3
    before, after = stage.load(0, [0]), make_stage(stage.config, changed).load(0, [0])
    with torch.no_grad():
        scores = [stage.network(batch) for batch in (before, after)]
    is_earlier = before.semantic.group_N < 6
    logits_of_same_bits = [score.semantic.losses_N[is_earlier] for score in scores]
    torch.testing.assert_close(*logits_of_same_bits)
    assert not torch.allclose(scores[0].semantic.losses_N[~is_earlier], scores[1].semantic.losses_N[~is_earlier])


def test_a_caption_has_the_duration_tag_once():
    flights = MixedFlights(frames=(7, 7), instructions=["turn left", "<<<t=3.0s>>>turn left"])
    assert CONFIG.horizon.num_frames == 6 * CONFIG.video_vae.temporal_stride + 1
    prompts = make_stage(flights=flights).load(0, [0, 1]).prompts()
    assert prompts[0] == prompts[1] == tuple(TOKENIZER.encode(tagged_prompt("turn left", CONFIG.horizon)))


def test_shorter_flights_say_their_own_duration():
    seconds = 2 * CONFIG.horizon.fps // CONFIG.video_vae.temporal_stride
    assert seconds * CONFIG.video_vae.temporal_stride == 2 * CONFIG.horizon.fps
    flights = MixedFlights(frames=(seconds + 1,), instructions=["turn left"])
    expected = TOKENIZER.encode("<<<t=2s>>>turn left")
    assert make_stage(flights=flights).load(0, [0]).prompts() == [tuple(expected)]


def test_frozen_text_is_computed_once_and_is_no_part_of_the_checkpoint():
    model = random_model(CONFIG)
    trained = make_stage(model=model)
    frozen = make_stage(msgspec.structs.replace(EXACT, train_text_encoder=False), model=model)
    assert any(key.startswith("text_encoder.") for key in trained.network.state_dict())
    assert not any(key.startswith("text_encoder.") for key in frozen.network.state_dict())
    calls = []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    losses = [mean_loss(frozen, [1, 3, 4]) for _ in range(3)]
    assert len(calls) == 3  # one a prompt
    assert losses[0] == pytest.approx(mean_loss(trained, [1, 3, 4]), rel=1e-4)
    batch = frozen.load(0, [1, 3])
    frozen.totals(batch)["loss"].backward()
    assert all(p.grad is None for p in model.text_encoder.parameters())
    assert all(not p.requires_grad for p in model.text_encoder.parameters())


def test_few_prompts_are_kept_when_asked_for():
    model = random_model(CONFIG)
    stage = make_stage(msgspec.structs.replace(EXACT, train_text_encoder=False, kept_prompts=1), model=model)
    calls = []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for row in (4, 3, 3, 4):
        mean_loss(stage, [row])
    assert len(calls) == 3


def test_checkpointed_activations_give_the_same_gradients():
    model = random_model(CONFIG)
    gradients = []
    for checkpointing in (False, True):
        stage = make_stage(msgspec.structs.replace(EXACT, checkpoint_activations=checkpointing), model=model)
        stage.network.zero_grad()
        stage.totals(stage.load(0, [1, 3]))["loss"].backward()
        gradients.append({name: p.grad for name, p in stage.network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_under_bf16_heads_and_loss_stay_fp32():
    stage = make_stage()
    batch = stage.load(0, [1, 3])
    exact = stage.totals(batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stage.totals(batch)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert loss.item() != exact.item()
    assert all(p.grad.dtype == torch.float32 for p in stage.network.parameters() if p.grad is not None)


def test_only_the_last_chunks_norm_and_heads_train_behind_frozen_ones():
    stage = make_stage(msgspec.structs.replace(EXACT, frozen_chunks=1))
    stage.totals(stage.load(0, [1, 3]))["loss"].backward()
    trained = {name for name, p in stage.network.named_parameters() if p.requires_grad}
    parts = ("world_model.block_chunks.1.", "world_model.norm_hidden_sates.", "world_model.head.")
    parts += ("world_model.semantic_head2.",)
    assert trained
    assert all(name.startswith(parts) for name in trained)
    assert all({name.startswith(part) for name in trained} == {True, False} for part in parts)
    assert trained == {name for name, p in stage.network.named_parameters() if p.grad is not None}
    with pytest.raises(ConfigError, match=r"frozen_chunks must be 0..1 \(the world model has 2 chunks\), found 2"):
        make_stage(msgspec.structs.replace(EXACT, frozen_chunks=2))


def test_only_adapters_train_and_export_is_plain():
    model = random_model(CONFIG)
    plain = {name: tensor.clone() for name, tensor in model.world_model.state_dict().items()}
    expected = mean_loss(make_stage(model=model), [1, 3])
    stage = make_stage(
        msgspec.structs.replace(EXACT, lora=LoraConfig(rank=2, targets=("q_proj", "down_proj"))), model=model
    )
    assert mean_loss(stage, [1, 3]) == pytest.approx(expected, rel=1e-5)
    optimiser = torch.optim.SGD([p for p in stage.network.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first step moves `lora_up` only
        optimiser.zero_grad()
        stage.totals(stage.load(0, [1, 3]))["loss"].backward()
        optimiser.step()
    trained = {name for name, p in stage.network.named_parameters() if p.grad is not None}
    assert trained
    assert all(name.endswith(("lora_down", "lora_up")) for name in trained)
    tuned = mean_loss(stage, [1, 3])
    assert tuned != pytest.approx(expected, rel=1e-4)
    exported = stage.exported_state(stage.network.state_dict())
    assert {f"world_model.{name}" for name in plain} == set(exported)
    fresh = random_model(CONFIG)
    fresh.world_model.load_state_dict({k.removeprefix("world_model."): v for k, v in exported.items()})
    assert mean_loss(make_stage(model=fresh), [1, 3]) == pytest.approx(tuned, rel=1e-4)


def test_broken_rows_are_named():
    flights = MixedFlights()
    flights.tensors[1] = flights.tensors[1] * float("nan")
    flights.instructions[3] = "<<<t=3s>>> "
    stage = make_stage(flights=flights)
    with pytest.raises(BackboneDataError, match=r"flights.jsonl:1: latents hold NaN or infinity; check the video"):
        stage.load(0, [0, 1])
    with pytest.raises(BackboneDataError, match=r"flights.jsonl:3: the instruction is empty; say what"):
        stage.load(0, [3])
    flights.latent_frames = lambda row: 5
    with pytest.raises(BackboneDataError, match=r"flights.jsonl:0: latents are \[16, 7, 2, 3\], \[16, 5, 2, 3\] are"):
        make_stage(flights=flights).load(0, [0])
    with pytest.raises(BackboneDataError, match="2 flights have 1 instructions"):
        LatentSet(torch.zeros(2, 16, 5, 2, 3), ["turn left"])


def test_held_out_flights_without_instruction_are_named_before_the_first_step():
    flights = MixedFlights()
    flights.instructions[3] = " "
    with pytest.raises(BackboneDataError, match=r"flights.jsonl:3: the instruction is empty"):
        make_stage(held_out=flights)
    make_stage(BackboneConfig(held_out_rows=3), held_out=flights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_strength": 1.5}, "sft.flip_strength is a probability, found 1.5"),
        ({"flip_strength": (0.1, -0.2)}, r"sft.flip_strength is a probability, found \(0.1, -0.2\)"),
        ({"condition_drop": -0.1}, "sft.condition_drop is a probability, found -0.1"),
        ({"scale_reweight": -1.0}, "sft.scale_reweight must be finite and >= 0"),
        ({"scale_weight_limit": 0.5}, "sft.scale_weight_limit must be finite and >= 1"),
        ({"micro_rows": 0}, "sft.micro_rows must be >= 1, found 0"),
        ({"packed_tokens": 0}, "sft.packed_tokens must be >= 1, found 0"),
        ({"lora": LoraConfig(), "frozen_chunks": 1}, "frozen_chunks must be 0 beside it"),
        ({"partial_scales": {"first": 1.0}}, "'first' names no part of a schedule"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(**changes)


def test_an_unknown_setting_is_an_error():
    with pytest.raises(msgspec.ValidationError, match="flip_strenght"):
        msgspec.convert({"flip_strenght": 0.1}, BackboneConfig)


def test_cached_latents_stand_beside_the_instructions_of_their_source():
    class Source:
        def __len__(self):
            return 2

        def name(self, row):
            return f"shard:{row}"

        def frame_count(self, row):
            return 13

        def instruction(self, row, generator=None):
            return ("turn left", "climb")[row] + ("" if generator is None else " .")

    latents = torch.randn(2, 16, 7, 2, 3)
    flights = CachedFlights(Source(), lambda row: latents[row], CONFIG.video_vae.temporal_stride)
    assert (len(flights), flights.name(1), flights.latent_frames(0)) == (2, "shard:1", 7)
    stage = make_stage(flights=flights)
    batch = stage.load(0, [1])
    assert batch.prompts() == [tuple(TOKENIZER.encode(tagged_prompt("climb .", CONFIG.horizon)))]
    expected = make_stage(flights=LatentSet(latents, ["turn left", "climb"])).load(0, [1])
    assert torch.equal(batch.detail.bits_Nd, expected.detail.bits_Nd)


@pytest.mark.slow
def test_eight_flights_are_learnt_by_heart_in_600_steps():
    """spec/training.md 8.4: without flips, cross entropy below 0.05."""
    torch.manual_seed(0)
    model = random_model(CONFIG)
    config = msgspec.structs.replace(EXACT, scale_reweight=0.5, step_rows=8, micro_rows=8)
    flights = MixedFlights(frames=(3,) * 8, instructions=[*INSTRUCTIONS, "fly left", "fly right"])
    stage = make_stage(config, flights, model)
    optimiser = torch.optim.AdamW(stage.network.parameters(), lr=3e-3, betas=(0.9, 0.97), weight_decay=0.0)
    ce = math.inf
    for epoch in range(600):
        [[rows]] = stage.plan(epoch)
        batch = stage.load(epoch, rows)
        totals, weights = stage.totals(batch), stage.weights(batch)
        optimiser.zero_grad()
        (totals["loss"] / weights["loss"]).backward()
        torch.nn.utils.clip_grad_norm_(stage.network.parameters(), 5.0)
        optimiser.step()
        ce = float(totals["bit_ce"]) / weights["bit_ce"]
    assert ce < 0.05
