"""Tokenizers: what is loaded, what is switched off, what a conversation's tokens are."""

import json
import pathlib
import runpy

import numpy as np
import pytest
import tokenizers

from lowrank_jax.models.chat_template import render_pieces
from lowrank_jax.models.tensors import CorruptFileError
from lowrank_jax.models.tokenizer import load_tokenizer

write_gguf = runpy.run_path(str(pathlib.Path(__file__).with_name("gguf_writer.py")))["write_gguf"]

WORDS = ["[PAD]", "[CLS]", "[SEP]", "<eos>", "a", "b", "c", "user", "assistant", "\n", "[UNK]"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} c {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def _folder(tmp_path, **config):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"pad_token": "[PAD]", "eos_token": {"content": "<eos>"}, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_stored_truncation_and_padding_are_off(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path))
    assert tokenizer.encode("a b c a").tolist() == [1, 4, 5, 6, 4, 2]
    assert tokenizer.encode("a").tolist() == [1, 4, 2]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, None, 3, 11)


def test_pairs_are_cut_the_longer_first_and_cutting_does_not_stay(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path))
    (found,) = tokenizer.encode_batch(["a b c a b c"], ["b"], max_length=6)
    assert found.ids.tolist() == [1, 4, 5, 2, 5, 2]
    assert found.types.tolist() == [0, 0, 0, 0, 1, 1]
    assert len(tokenizer.encode("a b c a b c")) == 8
    with pytest.raises(ValueError, match="second texts"):
        tokenizer.encode_batch(["a"], ["b", "c"])


def test_pad_falls_back_to_eos(tmp_path):
    assert load_tokenizer(_folder(tmp_path, pad_token=None)).pad_id == 3


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bos_token is '<none>'"):
        load_tokenizer(_folder(tmp_path, bos_token="<none>"))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    (_folder(tmp_path) / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match="tokenizer_config.json: not a JSON object"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_loads_equal(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path, chat_template=TEMPLATE))
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.pad_id, again.eos_id, again.chat_template) == (0, 3, TEMPLATE)


def test_the_assistant_part_of_a_conversation(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path, chat_template=TEMPLATE))
    turns = [("user", "a"), ("assistant", "b b"), ("user", "c"), ("assistant", "b")]
    ids, learned = tokenizer.chat([{"role": r, "content": c} for r, c in turns])
    assert [WORDS[i] for i in ids[learned]] == ["b", "b", "<eos>", "b", "<eos>"]
    words = "user a <eos> c assistant b b <eos> c user c <eos> c assistant b <eos> c"
    assert " ".join(WORDS[i] for i in ids) == words


def test_a_conversation_to_reply_to_has_nothing_to_learn(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path, chat_template=TEMPLATE))
    ids, learned = tokenizer.chat([{"role": "user", "content": "a"}], reply=True)
    assert " ".join(WORDS[i] for i in ids) == "user a <eos> c assistant"
    assert not learned.any()


def test_no_template_and_bad_messages(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(_folder(tmp_path)).chat([])
    with pytest.raises(ValueError, match="'role' and 'content'"):
        render_pieces(TEMPLATE, [{"role": "user"}], {})


def test_a_template_that_refuses_or_rewrites_says_so():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="no system"):
        render_pieces("{{ raise_exception('no system') }}", chat, {})
    with pytest.raises(ValueError, match="rewrites earlier text"):
        render_pieces("{{ messages | length }}", chat, {})


def test_a_hostile_template_stays_in_the_sandbox():
    chat = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="chat template"):
        render_pieces("{{ messages.__class__.__mro__[1].__subclasses__() }}", chat, {})
    with pytest.raises(ValueError, match="chat template"):
        render_pieces("{% set _ = messages.append(1) %}", chat, {})


def test_tokens_in_gguf_metadata(tmp_path):
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *letters, "ab", "Ġa"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["a b", "Ġ a"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", metadata, {}))
    text = "ab a 12é<|end|>"
    ids = tokenizer.encode(text)
    assert [tokens[i] for i in ids] == ["ab", "Ġa", "Ġ", "1", "2", "Ã", "©", "<|end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 0)
    for change, error, match in (
        ({"tokenizer.ggml.pre": "unheard-of"}, NotImplementedError, "unheard-of"),
        ({"tokenizer.ggml.merges": ["a zz"]}, CorruptFileError, "merges"),
        ({"tokenizer.ggml.token_type": [1]}, CorruptFileError, "types"),
        ({"tokenizer.ggml.eos_token_id": 10_000}, CorruptFileError, "eos_token_id"),
    ):
        with pytest.raises(error, match=match):
            load_tokenizer(write_gguf(tmp_path / "x.gguf", metadata | change, {}))


@pytest.mark.slow
def test_smollm2_chat():
    from lowrank_jax import assets

    tokenizer = load_tokenizer(assets.fetch("smollm2"))
    chat = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Hello"}]
    ids, learned = tokenizer.chat(chat)
    assert tokenizer.decode(ids[learned], skip_special_tokens=False) == "Hello<|im_end|>"
    expected = "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith(expected)
    assert ids.dtype == np.int32
