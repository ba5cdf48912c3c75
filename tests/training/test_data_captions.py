"""What a row says: which caption, how much of it, one tag at most."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.config import HorizonConfig
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.training.data.captions import CaptionConfig, draw_caption, shorten, without_tag
from worldvln_edge.training.trainer.stage import row_generator


def draws(count: int, caption: str, second: str = "", quality: str = "", **config) -> list[str]:
    settings = CaptionConfig(**config)
    return [draw_caption(caption, second, quality, settings, row_generator(0, 0, row)) for row in range(count)]


def test_nothing_is_drawn_without_a_generator():
    config = CaptionConfig(enable_dynamic_length_prompt=True, short_cap_prob=1.0)
    assert draw_caption("One. Two.", "other", "sharp", config, None) == "One. Two. sharp"


def test_second_caption_is_drawn_every_other_time():
    texts = draws(400, "first", "second")
    assert set(texts) == {"first", "second"}
    assert 160 < texts.count("first") < 240


def test_blank_second_caption_is_never_drawn():
    assert set(draws(50, "first", "  ")) == {"first"}


def test_caption_of_a_row_is_that_of_its_generator():
    config = CaptionConfig(enable_dynamic_length_prompt=True)
    again = [draw_caption("A. B. C.", "D. E.", "", config, row_generator(3, 1, 7)) for _ in range(5)]
    assert len(set(again)) == 1


def test_short_captions_come_as_often_as_the_config_says():
    texts = draws(600, "A. B. C.", enable_dynamic_length_prompt=True)
    assert set(texts) == {"A. B. C.", "A.", "A. B."}
    shortened = sum(text != "A. B. C." for text in texts)
    assert 70 < shortened < 170  # 0.3, of which a third keeps all three
    assert set(draws(50, "A. B. C.")) == {"A. B. C."}


@given(
    sentences=st.lists(st.text("ab ", min_size=1).filter(str.strip), min_size=2, max_size=5), seed=st.integers(0, 99)
)
def test_shortened_captions_are_the_first_sentences(sentences: list[str], seed: int):
    text = shorten(".".join(sentences), torch.Generator().manual_seed(seed))
    assert text.endswith(".")
    kept = text[:-1].split(".")
    assert kept == sentences[: len(kept)]


@pytest.mark.parametrize("caption", ["fly on", "fly on.", "..fly on.."])
def test_one_sentence_is_not_shortened(caption: str):
    assert shorten(caption, torch.Generator().manual_seed(0)) == caption


@pytest.mark.parametrize("tag", ["<<<t=3s>>>", "<<<t=3.0s>>>", " <<<t=3s>>> ", "<<<t=3s>>><<<t=3.0s>>>"])
def test_prompt_has_the_tag_once(tag: str):
    text = draw_caption(f"{tag}fly on", "", "", CaptionConfig(), None)
    assert tagged_prompt(text, HorizonConfig()) == "<<<t=3s>>>fly on"


def test_captions_without_a_tag_are_only_trimmed():
    assert without_tag(" fly <<<t=3s>>> on ") == "fly <<<t=3s>>> on"


def test_a_tag_with_a_point_is_no_sentence():
    config = CaptionConfig(enable_dynamic_length_prompt=True, short_cap_prob=1.0)
    drawn = {draw_caption("<<<t=3.0s>>>Turn. Climb.", "", "", config, row_generator(0, e, 0)) for e in range(40)}
    assert drawn == {"Turn.", "Turn. Climb."}
