"""Word tokenizer of the small presets."""

import numpy as np
import pytest
from small_models import WORDS

from worldvln_edge.config import HorizonConfig
from worldvln_edge.presets import nano
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.sim.instructions import instruction_vocabulary
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer, instruction_words

TAG = "<<<t=3s>>>"


def tokens(text: str, limit: int = 20) -> list[str]:
    inner = build_word_tokenizer(WORDS, TAG, 64)
    ids = PromptTokenizer(inner, limit).encode(text)
    assert ids.dtype == np.int64
    return [inner.id_to_token(i) for i in ids]


def test_words_numbers_and_marks_are_tokens():
    assert tokens(f"{TAG}Fly  forward 5 m.") == [TAG, "fly", "forward", "5", "m", ".", "</s>"]


def test_what_it_does_not_know_is_unknown_and_not_lost():
    assert tokens("fly 7 to Zürich!") == ["fly", "<unk>", "to", "<unk>", "<unk>", "<unk>", "<unk>", "</s>"]


def test_long_text_is_cut_and_still_ends():
    cut = tokens("fly forward " * 50, limit=6)
    assert cut == ["fly", "forward", "fly", "forward", "fly", "</s>"]


def test_empty_text_is_only_an_end():
    assert tokens("") == ["</s>"]


def test_words_of_the_flights_are_known_the_frequent_ones_first():
    texts = ["Fly to the red tower!", "fly to the blue tower 7.5 m"]
    words = instruction_words(texts, ("fly", "climb"), 64)
    assert words[:2] == ("fly", "climb")
    assert sorted(words[2:]) == sorted(["to", "the", "tower", "red", "blue", "!", "7.5", "m"])
    tokenizer = build_word_tokenizer(words, TAG, 64)
    assert tokenizer.token_to_id("<unk>") not in tokenizer.encode(TAG + texts[0]).ids
    with pytest.warns(
        UserWarning, match=r"^6 words of the instructions .*vocabulary 8 has no room .*frequent: tower, "
    ):
        assert instruction_words(texts, ("fly", "climb"), 8) == ("fly", "climb", "the", "to")


def test_too_many_words_for_the_preset_are_refused():
    with pytest.raises(ValueError, match=r"\d+ words do not fit text_encoder.vocabulary 10"):
        build_word_tokenizer(WORDS, TAG, 10)


def test_every_instruction_word_of_the_simulator_fits_the_nano_preset():
    config = nano()
    tag = tagged_prompt("", config.horizon)
    tokenizer = build_word_tokenizer(instruction_vocabulary(), tag, config.text_encoder.vocabulary)
    assert tokenizer.get_vocab_size() <= config.text_encoder.vocabulary
    unknown = tokenizer.token_to_id("<unk>")
    for word in instruction_vocabulary():
        assert unknown not in tokenizer.encode(tag + word).ids


def test_tags_of_other_lengths_are_tokens_and_words_keep_their_numbers():
    plain = build_word_tokenizer(WORDS, TAG, 64)
    inner = build_word_tokenizer(WORDS, TAG, 64, other_tags=("<<<t=0s>>>", "<<<t=2s>>>"))
    assert inner.get_vocab().items() >= plain.get_vocab().items()
    assert inner.encode("<<<t=2s>>>fly").tokens == ["<<<t=2s>>>", "fly", "</s>"]
    with pytest.raises(ValueError, match=r"do not fit text_encoder\.vocabulary"):
        build_word_tokenizer(WORDS, TAG, plain.get_vocab_size(), other_tags=("<<<t=2s>>>",))


def test_tags_take_room_from_the_words():
    texts = ["fly to the blue tower 7.5 m"]
    with pytest.warns(UserWarning, match=r"^5 words of the instructions are unknown"):
        assert instruction_words(texts, ("fly", "climb"), 8, tags=2) == ("fly", "climb", "7.5")


def test_the_tag_names_whole_seconds_of_the_whole_horizon():
    assert tagged_prompt("fly", HorizonConfig()) == "<<<t=3s>>>fly"
    assert tagged_prompt("fly", HorizonConfig(num_frames=81, step=16, fps=16)) == "<<<t=5s>>>fly"


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer file"):
        PromptTokenizer.load(path, 8)
    with pytest.raises(FileNotFoundError):
        PromptTokenizer.load(tmp_path / "nothing", 8)
