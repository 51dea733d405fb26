import io

import jax
import numpy as np
import pytest
import sentencepiece
from flax import nnx

from longlive_jax.models.umt5 import UMT5, Tokenizer, UMT5Config, clean, encode_prompts, prompts

SENTENCES = ["a quiet street at night, rain on the windows", "two dogs run along the beach"] * 20


def model(**settings):
    """A small T5-like SentencePiece model: unigram pieces, bytes for what they cannot spell."""
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
    for row, known in zip(ids, mask, strict=True):
        length = known.sum()
        assert known[:length].all() and row[length - 1] == 1
        assert not row[length:].any() and (row[: length - 1] > 1).all()
    assert mask[1].sum() == 1


def test_default_length_is_the_references(tokenizer):
    assert tokenizer.encode(["two dogs"])[0].shape == (1, 512)


def test_words_never_seen_are_spelt(tokenizer):
    assert "<unk>" not in tokenizer.pieces("色调 zebra €")
    assert 2 not in tokenizer.encode(["色调 zebra €"], 64)[0]


def test_truncation_keeps_the_end_mark_and_is_reported(tokenizer):
    long = "two dogs run along the beach " * 10
    ids, mask = tokenizer.encode(["two dogs", long], 12)
    assert mask[1].all() and ids[1, -1] == 1
    (cut,) = tokenizer.truncations(["two dogs", long], 12)
    assert (cut.index, cut.limit) == (1, 12)
    assert cut.tokens == tokenizer.encode([long], 512)[1].sum()
    assert clean(long).startswith(cut.kept)
    assert f"prompt 2 has {cut.tokens} tokens" in str(cut) and "\n" not in str(cut)
    assert not tokenizer.truncations([long], cut.tokens)


def test_reads_a_file(tokenizer, tmp_path):
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
    ids=["missing", "empty", "garbage", "other numbers"],
)
def test_bad_files_are_one_clear_error(content, message, tmp_path):
    path = tmp_path / "spiece.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer(tmp_path)


def test_one_string_is_not_a_list_of_prompts(tokenizer):
    with pytest.raises(ValueError, match="list of strings"):
        tokenizer.encode("two dogs")
    with pytest.raises(ValueError, match="length is 0"):
        tokenizer.encode(["two dogs"], 0)


def test_equal_prompts_are_encoded_once(umt5, tokenizer, monkeypatch):
    calls, encode = [], prompts._encode
    monkeypatch.setattr(prompts, "_encode", lambda *args: calls.append(1) or encode(*args))
    features = encode_prompts(umt5, tokenizer, ["a", "b", "a", " a ", ""], length=16)
    assert len(calls) == 3
    assert features.shape == (5, 16, 16)
    np.testing.assert_array_equal(features[0], features[2])
    np.testing.assert_array_equal(features[0], features[3])
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert np.isfinite(features).all() and np.abs(features[4, 0]).max() > 0
    assert not features[4, 1:].any()


def test_company_changes_no_bit_and_one_compilation_serves_all(umt5, tokenizer):
    some = ["two dogs", "a quiet street", "rain", "the beach", "windows"]
    prompts._encode.clear_cache()
    together = encode_prompts(umt5, tokenizer, some, length=20)
    for i, prompt in enumerate(some):
        np.testing.assert_array_equal(
            encode_prompts(umt5, tokenizer, [prompt], length=20)[0], together[i]
        )
    assert prompts._encode._cache_size() == 1


def test_equals_one_batched_call(umt5, tokenizer):
    some = ["two dogs", "a quiet street at night", ""]
    ids, mask = tokenizer.encode(some, 20)
    want = umt5(jax.numpy.asarray(ids), jax.numpy.asarray(mask))
    np.testing.assert_allclose(encode_prompts(umt5, tokenizer, some, length=20), want, atol=1e-5)


def test_a_tokenizer_too_large_for_the_encoder(tokenizer):
    small = UMT5(UMT5Config(40, 16, 16, 24, heads=2, layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"pieces, the text encoder 40"):
        encode_prompts(small, tokenizer, ["two dogs"], length=8)
    with pytest.raises(ValueError, match="no prompts"):
        encode_prompts(small, tokenizer, [], length=8)
