"""The tokenizer, and prompts through tokenizer and encoder together."""

import io
from typing import ClassVar

import jax
import numpy as np
import pytest
import sentencepiece
from flax import nnx

from longlive_jax.bench.timing import Compilations
from longlive_jax.models.umt5 import UMT5, Tokenizer, UMT5Config, clean, encode_prompts

SENTENCES = ["a quiet street at night, rain on the windows", "two dogs run along the beach"] * 20


def model(**settings):
    """A small T5-like SentencePiece model: unigram pieces with byte fallback."""
    out = io.BytesIO()
    defaults = {"vocab_size": 310, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES),
        model_writer=out,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **defaults | settings,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(model())


@pytest.fixture(scope="module")
def umt5(tokenizer):
    cfg = UMT5Config(tokenizer.vocab_size, dim=16, dim_attn=16, ffn_dim=24, heads=2, layers=2)
    return UMT5(cfg, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "text, want",
    [
        ("  two\t dogs\n\nrun ", "two dogs run"),
        ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
        ("schÃ¶n", "schön"),
        ("“curly”", '"curly"'),
        ("全角，逗号", "全角,逗号"),
        ("a\u00a0b\u3000c", "a b c"),
        ("&amp;nbsp; x", "x"),
        ("", ""),
    ],
)
def test_clean(text, want):
    assert clean(text) == want


def test_rows_end_in_the_end_mark_and_are_padded(tokenizer):
    ids, mask = tokenizer.encode(["two dogs", "", "a quiet street at night"], 24)
    assert ids.shape == mask.shape == (3, 24)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    for row, is_token in zip(ids, mask, strict=True):
        length = is_token.sum()
        assert is_token[:length].all() and row[length - 1] == 1
        assert not row[length:].any() and (row[: length - 1] > 1).all()
    assert mask[1].sum() == 1


def test_default_length_is_the_references(tokenizer):
    assert tokenizer.encode(["two dogs"])[0].shape == (1, 512)


def test_unknown_words_fall_back_to_bytes(tokenizer):
    assert "<unk>" not in tokenizer.pieces("色调 zebra €")
    assert 2 not in tokenizer.encode(["色调 zebra €"], 64)[0]


def test_truncation_keeps_the_end_mark_and_is_reported(tokenizer):
    long = "two dogs run along the beach " * 10
    ids, mask = tokenizer.encode(["two dogs", long], 12)
    assert mask[1].all() and ids[1, -1] == 1
    (truncation,) = tokenizer.truncations(["two dogs", long], 12)
    assert (truncation.index, truncation.limit) == (1, 12)
    assert truncation.tokens == tokenizer.encode([long], 512)[1].sum()
    assert clean(long).startswith(truncation.retained)
    message = str(truncation)
    assert f"prompt 2 has {truncation.tokens} tokens" in message and "\n" not in message
    assert not tokenizer.truncations([long], truncation.tokens)


def test_a_model_file_is_read(tokenizer, tmp_path):
    (tmp_path / "spiece.model").write_bytes(tokenizer.model)
    again = Tokenizer(tmp_path / "spiece.model")
    assert again.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(again.encode(["two dogs"])[0], tokenizer.encode(["two dogs"])[0])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read"),
        (b"", "not a SentencePiece model"),
        (b"PK\x03\x04 not a model" * 9, "not a SentencePiece model"),
        (model(pad_id=-1, unk_id=0, bos_id=1, eos_id=2), "begins with the pieces"),
    ],
    ids=["missing", "empty", "garbage", "other ids"],
)
def test_bad_files_are_one_line_errors(content, message, tmp_path):
    path = tmp_path / "spiece.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_not_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer(tmp_path)


def test_prompts_and_length_are_checked(tokenizer):
    with pytest.raises(ValueError, match="list of strings"):
        tokenizer.encode("two dogs")
    with pytest.raises(ValueError, match="length must be >= 1 to fit the end mark, got 0"):
        tokenizer.encode(["two dogs"], 0)


class CountingUMT5(UMT5):
    """Counts its executions in `calls`, including those of compiled calls."""

    calls: ClassVar[list[int]] = []

    def __call__(self, ids, mask):
        jax.debug.callback(lambda: self.calls.append(1))
        return super().__call__(ids, mask)


def test_equal_prompts_are_encoded_once(umt5, tokenizer):
    counting = CountingUMT5(umt5.cfg, rngs=nnx.Rngs(0))
    features = encode_prompts(counting, tokenizer, ["a", "b", "a", " a ", ""], length=16)
    jax.effects_barrier()
    assert len(counting.calls) == 3
    assert features.shape == (5, 16, 16)
    np.testing.assert_array_equal(features[0], features[2])
    np.testing.assert_array_equal(features[0], features[3])
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert np.isfinite(features).all() and np.abs(features[4, 0]).max() > 0
    assert not features[4, 1:].any()


def test_features_do_not_depend_on_other_prompts_and_need_one_compilation(umt5, tokenizer):
    some = ["two dogs", "a quiet street", "rain", "the beach", "windows"]
    together = np.asarray(encode_prompts(umt5, tokenizer, some, length=20))
    encode_prompts(umt5, tokenizer, some[:1], length=20)
    with Compilations() as compilations:
        alone = [encode_prompts(umt5, tokenizer, [prompt], length=20) for prompt in some]
    assert not compilations.counts
    np.testing.assert_array_equal(np.concatenate(alone), together)


def test_prompts_one_by_one_equal_one_batched_call(umt5, tokenizer):
    some = ["two dogs", "a quiet street at night", ""]
    ids, mask = tokenizer.encode(some, 20)
    want = umt5(jax.numpy.asarray(ids), jax.numpy.asarray(mask))
    np.testing.assert_allclose(encode_prompts(umt5, tokenizer, some, length=20), want, atol=1e-5)


def test_a_tokenizer_with_too_many_pieces_is_an_error(tokenizer):
    small = UMT5(UMT5Config(40, 16, 16, 24, heads=2, layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"pieces, the text encoder 40"):
        encode_prompts(small, tokenizer, ["two dogs"], length=8)
    with pytest.raises(ValueError, match="no prompts"):
        encode_prompts(small, tokenizer, [], length=8)
