"""From files to batches: sources, their faults, the token cache, resuming, shards."""

import json
import multiprocessing
import re
import resource
import signal

import numpy as np
import pytest
import tokenizers

from lowrank_jax.files import StorageError
from lowrank_jax.models.tokenizer import Tokenizer, load_tokenizer
from train.data import DataError, load
from train.data.builders.prepare import prepare
from train.data.builders.source import split_by_hash
from train.data.tokens import Example, token_table

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    """One token a byte; '|' ends a text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    config = {"eos_token": "|", "pad_token": "~", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sst2(tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    lines = [f"{'word ' * (i % 9)}number {i} \t{i % 2}" for i in range(50)]
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    (folder / "dev.tsv").write_text('sentence\tlabel\na "quoted\t1\nb\t0\n')
    return folder


def _same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_classification_batches(sst2, tokenizer):
    loader = load("glue/sst2", "train", tokenizer, batch_size=8, max_length=64, directory=sst2)
    assert (loader.num_examples, loader.steps_per_epoch, loader.num_labels) == (50, 6, 2)
    assert loader.label_names == ("negative", "positive")
    for batch, _ in zip(loader.iterator(), range(6), strict=False):
        assert batch["tokens"].shape == batch["mask"].shape == batch["token_types"].shape
        for tokens, mask, label in zip(batch["tokens"], batch["mask"], batch["label"], strict=True):
            text = tokenizer.decode(tokens[mask])
            assert int(text.split()[-1]) % 2 == label
    assert 0 <= loader.padding_share() < 0.5


def test_evaluation_covers_every_example_once(sst2, tokenizer):
    loader = load("glue/sst2", "train", tokenizer, batch_size=8, max_length=64, directory=sst2)
    batches = list(loader.evaluation_batches())
    seen = np.concatenate([b["index"][b["valid"]] for b in batches])
    assert sorted(seen.tolist()) == list(range(50))
    assert [b["valid"].sum() for b in batches] == [8] * 6 + [2]
    assert all(b["mask"].any(1).all() for b in batches)
    assert batches[0]["label"][0] == batches[0]["index"][0] % 2


def test_quotes_are_plain_characters_in_tsv(sst2, tokenizer):
    loader = load("glue/sst2", "validation", tokenizer, batch_size=2, max_length=64, directory=sst2)
    (batch,) = loader.evaluation_batches()
    texts = [tokenizer.decode(t[m]) for t, m in zip(batch["tokens"], batch["mask"], strict=True)]
    assert sorted(texts) == ['a "quoted', "b"]


@pytest.mark.parametrize("step", [0, 3, 6, 17])
def test_resuming_anywhere_goes_on_with_the_very_next_batch(sst2, tokenizer, step):
    loader = load("glue/sst2", "train", tokenizer, batch_size=8, max_length=64, directory=sst2)
    whole = loader.iterator()
    for _ in range(step):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    again = load("glue/sst2", "train", tokenizer, batch_size=8, max_length=64, directory=sst2).iterator(state)
    assert (again.step, again.epoch) == (step, step // 6)
    for _ in range(8):
        _same(next(whole), next(again))


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 4}, {"max_length": 16}, {"limit": 40}])
def test_a_state_of_other_settings_is_refused(sst2, tokenizer, change):
    settings = {"batch_size": 8, "max_length": 64, "directory": sst2}
    state = load("glue/sst2", "train", tokenizer, **settings).iterator().state()
    with pytest.raises(ValueError, match="state was saved with other"):
        load("glue/sst2", "train", tokenizer, **(settings | change)).iterator(state)


def test_shards_together_are_the_global_batch_and_share_its_width(sst2, tokenizer):
    settings = {"batch_size": 8, "max_length": 64, "directory": sst2}
    whole = load("glue/sst2", "train", tokenizer, **settings)
    shares = np.array([[0, 5], [1, 2], [3, 7], [4, 6]])
    parts = [load("glue/sst2", "train", tokenizer, **settings, share=share) for share in shares]
    iterators = [part.iterator() for part in parts]
    for _, batch in zip(range(8), whole.iterator(), strict=False):
        pieces = [next(it) for it in iterators]
        rows = np.concatenate([p["tokens"] for p in pieces])
        np.testing.assert_array_equal(rows, batch["tokens"][shares.ravel()])
    seen = np.concatenate([b["index"][b["valid"]] for p in parts for b in p.evaluation_batches()])
    assert sorted(seen.tolist()) == list(range(50))
    # More or fewer machines may go on from the same state.
    assert parts[0].fingerprint == whole.fingerprint


def test_tokens_are_cached_and_changed_files_are_not_mistaken(sst2, tokenizer, cache, monkeypatch):
    settings = {"batch_size": 2, "max_length": 64, "directory": sst2}
    load("glue/sst2", "validation", tokenizer, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", None)
        load("glue/sst2", "validation", tokenizer, **settings)
    (sst2 / "dev.tsv").write_text("sentence\tlabel\nnew\t1\nother\t1\n")
    (batch,) = load("glue/sst2", "validation", tokenizer, **settings).evaluation_batches()
    assert batch["label"].tolist() == [1, 1]
    assert not [f for f in (cache / "lowrank_jax" / "tokens").iterdir() if f.name.startswith(".")]


class Flaky(list):
    """Records on a disk that fails a number of times."""

    failures = 0

    def __getitems__(self, indices):
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        return [self[i] for i in indices]


def test_records_that_cannot_be_read_are_read_again(cache, monkeypatch, caplog):
    monkeypatch.setattr("train.data.tokens._PAUSE", 0.0)
    records, encode = Flaky([[3, 4], [5]]), lambda many: [Example(np.array(x), np.array(x), 0.0) for x in many]
    records.failures = 2
    table = token_table(records, encode, ["twice"])
    assert table.ids.tolist() == [3, 4, 5] and "examples 0 to 1 could not be read" in caplog.text
    records.failures = 3
    with pytest.raises(
        DataError, match=r"examples 0 to 1 could not be read \(\[Errno 5\] Input.*attempt 3 of 3\. Look after the disk"
    ):
        token_table(records, encode, ["three times"])
    assert len(list((cache / "lowrank_jax" / "tokens").iterdir())) == 1


def test_classification_texts_are_cut(sst2, tokenizer):
    loader = load("glue/sst2", "train", tokenizer, batch_size=8, max_length=10, directory=sst2)
    assert next(loader.iterator())["tokens"].shape[1] <= 10
    assert loader.num_examples == 50


def test_pairs_and_scores(tmp_path, tokenizer):
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    (tmp_path / "train.tsv").write_text(header + "0\tg\tf\ty\to\ts\ts\tone\ttwo\t3.75\n")
    loader = load("glue/stsb", "train", tokenizer, batch_size=1, max_length=16, directory=tmp_path)
    (batch,) = loader.evaluation_batches()
    assert batch["label"].dtype == np.float32 and batch["label"].tolist() == [3.75]
    assert batch["token_types"][0, :6].tolist() == [0, 0, 0, 1, 1, 1]
    assert (loader.num_labels, loader.label_names) == (1, ())
    (tmp_path / "train.tsv").write_text(header + "0\tg\tf\ty\to\ts\ts\tone\ttwo\tnan\n")
    with pytest.raises(ValueError, match="score 'nan'"):
        load("glue/stsb", "train", tokenizer, batch_size=1, max_length=16, directory=tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sentence\tlabel\nx\t2\n", "label '2'; expected 0 or 1"),
        ("sentence\tmark\nx\t1\n", "no column 'label'"),
        ("sentence\tlabel\nx\n", "line 2: 1 columns"),
        ("sentence\tlabel\n", "is empty"),
        ("", "no column 'sentence'"),
    ],
)
def test_malformed_tables_are_refused_and_leave_nothing(tmp_path, tokenizer, cache, text, match):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=match):
        load("glue/sst2", "train", tokenizer, batch_size=1, max_length=16, directory=tmp_path)
    prepared = cache / "lowrank_jax" / "tfds" / "lowrank_data"
    assert not prepared.exists() or not [f for f in prepared.rglob("*") if f.is_file()]


def test_settings_that_do_not_fit(sst2, tokenizer):
    good = {"batch_size": 4, "max_length": 16, "directory": sst2}
    for changes, match in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"share": np.array([2, 4])}, r"share=\[2 4\]: expected rows of a batch"),
        ({"share": np.array([], int)}, "share"),
        ({"task": "causal_lm"}, "is for classification"),
        ({"pack": True}, "prompts with completions"),
        ({"directory": sst2 / "absent"}, "no such directory"),
        ({"directory": sst2.parent}, "none of train.tsv, dev.tsv.*expects train.tsv and dev.tsv of SST-2"),
    ):
        with pytest.raises(ValueError, match=match):
            load("glue/sst2", "train", tokenizer, **(good | changes))
    with pytest.raises(DataError, match="pass directory=.*with train.csv"):
        load("banking77", "train", tokenizer, **(good | {"directory": None}))
    with pytest.raises(DataError, match="Did you mean 'glue/sst2'"):
        load("glue/sst-2", "train", tokenizer, **good)
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        load("glue/sst2", "test", tokenizer, **good)
    with pytest.raises(ValueError, match="do not fill a batch of 64"):
        load("glue/sst2", "train", tokenizer, **(good | {"batch_size": 64})).iterator()


def _e2e(folder, count=20):
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_text("".join(f"name : {i}||The {'x' * (i % 5)}place {i}\n" for i in range(count)))
    return folder


def test_prompts_with_completions(tmp_path, tokenizer):
    loader = load("e2e", "train", tokenizer, batch_size=4, max_length=64, directory=_e2e(tmp_path / "e2e"))
    batch = next(loader.iterator())
    for tokens, learned, segments in zip(batch["tokens"], batch["loss_mask"], batch["segment_ids"], strict=True):
        prompt, _, completion = tokenizer.decode(tokens[segments == 1]).partition("\n")
        assert tokenizer.decode(tokens[learned]) == completion
        assert completion.startswith("The ") and completion.endswith(prompt.split()[-1] + "|")


def test_chat_learns_the_reply_and_its_end(tmp_path, tokenizer):
    settings = {"batch_size": 4, "max_length": 128, "directory": _e2e(tmp_path / "e2e")}
    batch = next(load("e2e", "train", tokenizer, **settings, chat=True).iterator())
    tokens, learned = batch["tokens"][0], batch["loss_mask"][0]
    assert tokenizer.decode(tokens).startswith("user: name : ")
    reply = tokenizer.decode(tokens[learned])
    assert reply.startswith("The ") and reply.endswith("|")


def test_packing_keeps_every_learned_token(tmp_path, tokenizer):
    settings = {"batch_size": 2, "max_length": 128, "directory": _e2e(tmp_path / "e2e")}
    plain, packed = (load("e2e", "train", tokenizer, **settings, pack=pack) for pack in (False, True))

    def learned(loader):
        return sum(int(b["loss_mask"].sum()) for b in loader.evaluation_batches())

    assert learned(plain) == learned(packed)
    assert packed.steps_per_epoch < plain.steps_per_epoch
    batch = next(packed.iterator())
    assert batch["tokens"].shape == (2, 128)
    assert batch["segment_ids"].max() > 1


def test_examples_that_are_too_long_are_dropped_and_counted(tmp_path, tokenizer, caplog):
    folder = _e2e(tmp_path / "e2e")
    (folder / "train.txt").write_text("a||short\nb||" + "long" * 20 + "\n")
    loader = load("e2e", "train", tokenizer, batch_size=1, max_length=16, directory=folder)
    assert (loader.num_examples, loader.table.dropped) == (1, 1)
    assert "1 of 2 examples" in caplog.text
    with pytest.raises(ValueError, match="all 2 examples are longer than max_length=4; the longest has 83"):
        load("e2e", "train", tokenizer, batch_size=1, max_length=4, directory=folder)


def test_running_text_is_cut_into_full_rows(tmp_path, tokenizer):
    lines = [f"line {i}\n" for i in range(200)]
    (tmp_path / "book.txt").write_text("".join(lines))
    parts = {}
    for split in ("train", "validation", "test"):
        loader = load("text", split, tokenizer, batch_size=2, max_length=32, directory=tmp_path / "book.txt")
        rows = sorted(
            (
                (i, t, s)
                for b in loader.evaluation_batches()
                for i, t, s in zip(b["index"], b["tokens"], b["segment_ids"], strict=True)
                if i >= 0
            ),
            key=lambda row: row[0],
        )
        parts[split] = "".join(tokenizer.decode(t[s == 1]) for _, t, s in rows)
    assert parts["train"] == "".join(lines[:180]) + "|"
    assert parts["validation"] == "".join(lines[180:190]) + "|"
    assert parts["test"] == "".join(lines[190:]) + "|"


def test_jsonl_faults(tmp_path, tokenizer):
    settings = {"batch_size": 1, "max_length": 64, "directory": tmp_path}
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(ValueError, match="example 2: no text 'answer'"):
        load("gsm8k", "train", tokenizer, **settings)
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load("gsm8k", "train", tokenizer, **settings)
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (batch,) = load("gsm8k", "train", tokenizer, **settings).evaluation_batches()
    assert tokenizer.decode(batch["tokens"][0][batch["segment_ids"][0] == 1]) == "a\nb|"


def test_split_by_hash_keeps_repeated_texts_out_of_other_splits():
    texts = [f"t{i}" for i in range(100)] + [f"T{i} " for i in range(100)]
    sizes = {"validation": 10, "test": 20, "train": -1}
    found = split_by_hash([{"text": t} for t in texts], sizes)
    assert {k: len(v) for k, v in found.items()} == {"validation": 10, "test": 20, "train": 70}
    assert len({r["text"] for part in found.values() for r in part}) == 100
    shuffled = split_by_hash([{"text": t} for t in texts[:100][::-1]], sizes)
    assert shuffled["test"] == found["test"]


def _prepare_in_child(folder, barrier, queue):
    from train.data.builders import source
    from train.data.builders.prepare import SOURCES, prepare

    def read(files):  # so slow that the other child begins before this one ends
        barrier.wait()
        return source.per_split(lambda path: [{"prompt": "a", "completion": "b"}])(files)

    SOURCES["e2e"] = SOURCES["e2e"]._replace(read=read)
    queue.put(len(prepare("e2e", "train", folder).records))


def _prepare_with_little_room(file, said):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        prepare("text", "train", file)
    except StorageError as error:
        said.put(str(error))
    else:
        said.put("nothing was refused")


def test_a_disk_that_takes_no_more_is_named(tmp_path):
    text = "".join(chr(97 + n) for n in np.random.default_rng(0).integers(0, 26, 400_000))
    (tmp_path / "text.txt").write_text("\n".join(text[n : n + 80] for n in range(0, len(text), 80)))
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    process = context.Process(target=_prepare_with_little_room, args=(tmp_path / "text.txt", said))
    process.start()
    message = said.get(timeout=120)
    process.join()
    assert re.fullmatch(
        r".*/tfds.* could not be written \(File too large\)\. It is in the cache, which .*start again\.", message
    )
    assert len(prepare("text", "train", tmp_path / "text.txt").records)  # once there is room


def test_two_processes_prepare_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    folder = _e2e(tmp_path / "e2e")
    children = [context.Process(target=_prepare_in_child, args=(folder, barrier, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=120) for _ in children] == [1, 1]
    for child in children:
        child.join()


def test_nothing_imports_tensorflow(tmp_path, tokenizer):
    import subprocess
    import sys

    folder = _e2e(tmp_path / "e2e")
    code = (
        "import sys\nfrom lowrank_jax.models.tokenizer import load_tokenizer\nfrom train.data import load\n"
        f"t = load_tokenizer({str(tmp_path / 'tokenizer')!r})\n"
        f"next(load('e2e', 'train', t, batch_size=2, max_length=64, directory={str(folder)!r}).iterator())\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
