from __future__ import annotations

import hashlib
import math
import os
import pickle
import socket
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import joblib
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import OmegaConf
from sklearn.calibration import CalibratedClassifierCV
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import MergeContext
from eval.scorers.classifiers import (
    LABELS,
    LENGTH,
    KerasTokenizer,
    Linear,
    SixLabels,
    read_keras_tokenizer,
    read_linear,
    read_six_labels,
    six_labels,
    windows,
)
from eval.scorers.detoxify_checkpoint import NAMES, detoxify_labels, read_detoxify
from eval.scorers.interface import LoadedModel, Prompt, unscored
from eval.scorers.toxicity import BILSTM, LINEAR, Toxicity

WORDS = [
    "red",
    "green",
    "blue",
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "a",
    "mat",
    "nice",
    "day",
    "rain",
    "sun",
    "tree",
    "house",
    "road",
    "car",
]
Array = NDArray[Any]
CONF = Path(__file__).parents[2] / "conf" / "scorer"


@dataclass
class Talker:
    """A subject with given replies and files."""

    said: dict[str, list[str]]
    files: dict[str, Path] = field(default_factory=dict)
    folder: Path = Path()
    split: str = "test"

    def loaded(self) -> LoadedModel:
        raise AssertionError("toxicity needs no model, only its replies")

    def prompts(self, name: str) -> Sequence[Prompt]:
        return [Prompt(f"p{at}", f"question {at}") for at in range(len(self.said[name]))]

    def replies(self, name: str) -> Sequence[str]:
        return self.said[name]

    def rendered(self, name: str) -> Sequence[str]:
        return [f"<user> {prompt.text}" for prompt in self.prompts(name)]

    def asset(self, reference: str) -> Path:
        return self.files[reference]

    def context(self) -> MergeContext:
        raise AssertionError("toxicity is no distance")


def write_tokenizer(path: Path, **changes: object) -> None:
    """Pickle what Keras pickles, under its name; Keras itself is not there when the file is read."""
    parts = ["keras", "src", "legacy", "preprocessing", "text"]
    modules = {name: types.ModuleType(name) for name in (".".join(parts[:n]) for n in range(1, 6))}
    last = list(modules.values())[-1]
    last.Tokenizer = type("Tokenizer", (), {"__module__": last.__name__})  # type: ignore[attr-defined]
    tokenizer = last.Tokenizer()
    tokenizer.word_index = {word: at for at, word in enumerate(WORDS, start=1)}
    tokenizer.num_words = 16  # the last words are out of reach
    rules = {"filters": '!"#.,\t\n', "lower": True, "split": " ", "char_level": False, "oov_token": None}
    tokenizer.__dict__.update({**rules, **changes})
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        path.write_bytes(pickle.dumps(tokenizer, protocol=5))


def write_weights(path: Path, drop: str = "", poison: str = "") -> dict[str, NDArray[np.float32]]:
    """Write random Keras weights: 16 words, embedding 3, state 4, hidden layer 5."""
    random = np.random.default_rng(0)
    shapes = {"embedding/vars/0": (16, 3), "dense/vars/0": (8, 5), "dense/vars/1": (5,)}
    shapes |= {"dense_1/vars/0": (5, 6), "dense_1/vars/1": (6,)}
    for way in ("forward_layer", "backward_layer"):
        cell = f"bidirectional/{way}/cell/vars"
        shapes |= {f"{cell}/0": (3, 16), f"{cell}/1": (4, 16), f"{cell}/2": (16,)}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if poison:
        weights[poison].flat[0] = np.nan
    with h5py.File(path, "w") as file:
        for name, weight in weights.items():
            if name != drop:
                file[f"layers/{name}"] = weight
    return weights


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def keras_lstm(inputs: Array, kernel: Array, recurrent: Array, bias: Array) -> Array:
    """One step at a time, as the Keras documentation has it: gates i, f, c, o."""
    size = recurrent.shape[0]
    state, cell, states = np.zeros(size), np.zeros(size), []
    for x in inputs:
        z = x @ kernel + state @ recurrent + bias
        i, f, c, o = (z[k * size : (k + 1) * size] for k in range(4))
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(c)
        state = sigmoid(o) * np.tanh(cell)
        states.append(state)
    return np.array(states)


def keras_labels(weights: dict[str, NDArray[np.float32]], ids: Sequence[int]) -> Array:
    """The whole network on one padded window in float64."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    padded = [0] * (LENGTH - len(ids)) + list(ids)
    x = w["embedding/vars/0"][padded]
    ahead, back = (
        [w[f"bidirectional/{way}/cell/vars/{k}"] for k in range(3)]
        for way in ("forward_layer", "backward_layer")
    )
    states = np.concatenate([keras_lstm(x, *ahead), keras_lstm(x[::-1], *back)[::-1]], axis=1)
    hidden = np.maximum(states.max(0) @ w["dense/vars/0"] + w["dense/vars/1"], 0)
    return sigmoid(hidden @ w["dense_1/vars/0"] + w["dense_1/vars/1"])


class Tiny(NamedTuple):
    """A random BiLSTM on the disk and in memory."""

    folder: Path
    weights: dict[str, NDArray[np.float32]]
    network: SixLabels
    vocabulary: KerasTokenizer

    def score(self, texts: list[str], batch_size: int = 64) -> NDArray[np.float64]:
        return six_labels(self.network, self.vocabulary, texts, batch_size)


@pytest.fixture(scope="module")
def bilstm(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("bilstm")
    write_tokenizer(folder / "tokenizer.pickle")
    weights = write_weights(folder / "model.weights.h5")
    network, vocabulary = (
        read_six_labels(folder / "model.weights.h5"),
        read_keras_tokenizer(folder / "tokenizer.pickle"),
    )
    return Tiny(folder, weights, network, vocabulary)


def sentences(count: int) -> list[str]:
    random = np.random.default_rng(1)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 12))) for _ in range(count)]


def fit_linear(folder: Path) -> tuple[TfidfVectorizer, CalibratedClassifierCV]:
    """Fit and store the kind of model that alt-profanity-check ships."""
    texts = sentences(60)
    vectorizer = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)\b\w\w+\b")
    X = vectorizer.fit_transform(texts)
    model = CalibratedClassifierCV(LinearSVC(class_weight="balanced", dual=False), method="sigmoid", cv=5)
    model.fit(X, ["cat" in text for text in texts])
    joblib.dump(vectorizer, folder / "vectorizer.joblib")
    joblib.dump(model, folder / "model.joblib")
    return vectorizer, model


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[list[str]], Array]]:
    folder = tmp_path_factory.mktemp("linear")
    vectorizer, model = fit_linear(folder)
    return folder, lambda texts: model.predict_proba(vectorizer.transform(texts))[:, 1]


def load_linear(folder: Path) -> Linear:
    return read_linear(folder / "vectorizer.joblib", folder / "model.joblib")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


# --- windows ------------------------------------------------------------------------------------------------


@given(st.integers(0, 400), st.integers(1, 120))
def test_windows_cover_everything_in_order_and_overlap_by_half(count: int, length: int) -> None:
    cut = windows(list(range(count)), length)
    assert sorted({item for window in cut for item in window}) == list(range(count))
    if count <= length:
        assert cut == [list(range(count))]
        return
    assert all(len(window) == length and window[-1] - window[0] == length - 1 for window in cut)
    assert all(0 < later[0] - earlier[0] <= max(1, length // 2) for earlier, later in pairwise(cut))


# --- the BiLSTM ---------------------------------------------------------------------------------------------


def test_bilstm_equals_the_keras_equations(bilstm: Tiny) -> None:
    ids = [[4, 5, 7, 8, 9, 10], [1, 2, 3], [14]]
    expected = np.array([keras_labels(bilstm.weights, row) for row in ids])
    found = bilstm.score(["The cat, sat on a mat!", "RED green\tblue", "sun"], batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected.std(0).min() > 1e-4, "the texts must differ in every label"


def test_words_out_of_reach_are_dropped_like_unknown_ones(bilstm: Tiny) -> None:
    assert bilstm.vocabulary.ids("tree house cat zebra road") == [15, 5]  # house is 16, which is num_words


def test_long_text_gets_the_worst_window_of_each_label(bilstm: Tiny) -> None:
    ids = np.random.default_rng(2).integers(1, 16, size=230).tolist()
    parts = [keras_labels(bilstm.weights, ids[start : start + 100]) for start in (0, 50, 100, 130)]
    found = bilstm.score([" ".join(WORDS[i - 1] for i in ids)])
    np.testing.assert_allclose(found[0], np.max(parts, axis=0), atol=1e-6)


def test_scores_do_not_depend_on_the_batch(bilstm: Tiny) -> None:
    texts = [*sentences(7), "zebra", "cat " * 120]
    np.testing.assert_allclose(bilstm.score(texts, 1), bilstm.score(texts, 64), atol=1e-6)


def test_text_without_a_known_word_is_unscored(bilstm: Tiny) -> None:
    found = bilstm.score(["zebra xylophone", "cat"])
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()
    assert bilstm.score([]).shape == (0, 6)


@pytest.mark.parametrize("damage", [{"drop": "dense/vars/1"}, {"poison": "embedding/vars/0"}])
def test_damaged_weights_are_refused(tmp_path: Path, damage: dict[str, str]) -> None:
    write_weights(tmp_path / "model.weights.h5", **damage)
    with pytest.raises(BadRequest, match=r"model\.weights\.h5"):
        read_six_labels(tmp_path / "model.weights.h5")


def test_garbage_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "model.weights.h5").write_bytes(b"nonsense" * 100)
    with pytest.raises(BadRequest, match=r"model\.weights\.h5"):
        read_six_labels(tmp_path / "model.weights.h5")


# --- pickles as data ----------------------------------------------------------------------------------------


def test_hostile_tokenizer_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(BadRequest, match=r"posix\.system|nt\.system"):
        read_keras_tokenizer(tmp_path / "tokenizer.pickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: np.array([bomb], dtype=object)])
@pytest.mark.parametrize("name", ["vectorizer.joblib", "model.joblib"])
def test_hostile_joblib_runs_nothing(tmp_path: Path, name: str, wrap: Callable[[Bomb], object]) -> None:
    fit_linear(tmp_path)
    joblib.dump(wrap(Bomb(tmp_path / "ran")), tmp_path / name)
    with pytest.raises(BadRequest, match=name):
        load_linear(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x05garbage", pickle.dumps({"word_index": {}})])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.pickle").write_bytes(content)
    with pytest.raises(BadRequest, match=r"tokenizer\.pickle"):
        read_keras_tokenizer(tmp_path / "tokenizer.pickle")


def test_tokenizer_with_other_rules_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.pickle", oov_token="<unk>")
    with pytest.raises(BadRequest, match="oov_token='<unk>'; allowed: oov_token=None"):
        read_keras_tokenizer(tmp_path / "tokenizer.pickle")


# --- the linear cross-check ---------------------------------------------------------------------------------


def test_linear_equals_scikit_learn(linear: tuple[Path, Callable[[list[str]], Array]]) -> None:
    folder, peer = linear
    model = load_linear(folder)
    texts = [*sentences(20), "The CAT and the cat", "zebra", "", "on a the"]
    np.testing.assert_allclose([model.probability(text) for text in texts], peer(texts), atol=1e-12)


def test_linear_takes_the_worst_window(linear: tuple[Path, Callable[[list[str]], Array]]) -> None:
    folder, peer = linear
    words = ["rain"] * 60 + ["cat"] * 10 + ["dog"] * 60
    parts = [" ".join(words[:100]), " ".join(words[30:])]
    whole = load_linear(folder).probability(" ".join(words))
    assert whole == pytest.approx(peer(parts).max(), abs=1e-12)
    assert whole != pytest.approx(peer([" ".join(words)])[0], abs=1e-3), "the windows must matter"


def test_vectorizer_with_other_settings_is_refused(tmp_path: Path) -> None:
    fit_linear(tmp_path)
    joblib.dump(
        TfidfVectorizer(ngram_range=(1, 2)).fit(["red cat", "blue dog"]), tmp_path / "vectorizer.joblib"
    )
    with pytest.raises(BadRequest, match=r"ngram_range=\(1, 2\)"):
        load_linear(tmp_path)


def test_vectorizer_of_another_model_is_refused(tmp_path: Path) -> None:
    fit_linear(tmp_path)
    joblib.dump(TfidfVectorizer().fit(["red cat", "blue dog"]), tmp_path / "vectorizer.joblib")
    with pytest.raises(BadRequest, match=r"model\.joblib"):
        load_linear(tmp_path)


# --- the scorer ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(bilstm: Tiny, linear: tuple[Path, Callable[[list[str]], Array]]) -> dict[str, Path]:
    return {BILSTM: bilstm.folder, LINEAR: linear[0]}


def test_scorer_reports_each_reply_of_each_set(files: dict[str, Path], bilstm: Tiny) -> None:
    subject = Talker({"toxic": ["the cat sat", "red sun"], "unsafe": ["blue dog"]}, files)
    p = [keras_labels(bilstm.weights, ids)[0] for ids in ([4, 5, 7], [1, 14], [3, 6])]
    threshold = float(np.sort(p)[1]) - 1e-4  # two of three reach it
    samples = list(Toxicity(threshold=threshold).score(subject))
    value = {(sample.column, sample.id): sample.value for sample in samples}
    ids = ["toxic/p0", "toxic/p1", "unsafe/p0"]
    assert [value["toxicity_mean", i] for i in ids] == pytest.approx(p, abs=1e-6)
    assert [value["toxicity_rate", i] for i in ids] == [float(x >= threshold) for x in p]
    assert sum(value["toxicity_rate", i] for i in ids) == 2
    check = load_linear(files[LINEAR])
    assert value["toxicity_check", "unsafe/p0"] == check.probability("blue dog")
    assert len(samples) == len(value) == 9
    assert {sample.column for sample in samples} == set(Toxicity.columns)


def test_samples_carry_the_six_labels_and_the_digest_of_what_the_model_saw(
    files: dict[str, Path],
) -> None:
    subject = Talker({"toxic": ["the cat sat"]}, files)
    first = next(iter(Toxicity(sets=["toxic"]).score(subject)))
    assert list(first.detail) == list(LABELS)
    assert first.detail["toxic"] == round(first.value, 4)
    assert first.prompt == hashlib.sha256(b"<user> question 0").hexdigest()[:16]
    assert "cat" not in str(first)


def test_silence_is_not_toxic_and_unknown_words_are_unscored(files: dict[str, Path]) -> None:
    subject = Talker({"toxic": ["", " \n...!", "zebra", "cat"]}, files)
    samples = list(Toxicity(sets=["toxic"]).score(subject))
    by_id = {i: [s.value for s in samples if s.id == f"toxic/p{i}"] for i in range(4)}
    assert by_id[0] == by_id[1] == [0.0, 0.0, 0.0]
    assert all(math.isnan(value) for value in by_id[2])
    assert not any(math.isnan(value) for value in by_id[3])
    assert sum(map(unscored, samples)) == 3


def test_as_many_replies_as_prompts_or_an_error(files: dict[str, Path]) -> None:
    subject = Talker({"toxic": ["cat", "dog"]}, files)
    subject.replies = lambda name: ["cat"]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="shorter"):
        list(Toxicity(sets=["toxic"]).score(subject))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"backend": "perspective"}, "backend"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": math.inf}, "threshold"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": "half"}, "threshold"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"sets": []}, "sets"),
        ({"sets": "toxic"}, "sets"),
        ({"sets": ["toxic", "toxic"]}, "sets"),
        ({"sets": ["toxic", 3]}, "sets"),
        ({"checkpoint": "somewhere.pt"}, "checkpoint"),
        ({"backend": "detoxify", "checkpoint": "a", "checkpoint_config": "b"}, "checkpoint_sha256"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Toxicity(**fields)
    assert [fault.where for fault in caught.value.faults] == [f"scorer.toxicity.{key}"]


def test_every_wrong_field_is_reported_at_once() -> None:
    with pytest.raises(BadRequest) as caught:
        Toxicity(backend="detoxify", batch_size=0, threshold=2.0)
    assert len(caught.value.faults) == 5


def test_yaml_makes_the_scorer() -> None:
    config = OmegaConf.load(CONF / "toxicity.yaml")
    scorer = instantiate(config.toxicity, _convert_="all")
    assert scorer == Toxicity(sets=["toxic", "unsafe"])


# --- detoxify -----------------------------------------------------------------------------------------------

CLASSES = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with config and tokenizer, and what a detoxify checkpoint holds."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=34, num_labels=6,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        held = BertForSequenceClassification(config).state_dict()
        weights = {key: value + torch.randn(value.shape) for key, value in held.items()}
    names = {"model_name": "BertForSequenceClassification", "tokenizer_name": "BertTokenizer"}
    arch = {"args": {"model_type": "bert-base-uncased", "num_classes": 6, **names}}
    return folder, {
        "config": {"dataset": {"args": {"classes": CLASSES}}, "arch": arch},
        "state_dict": weights,
    }


def stored(path: Path, checkpoint: object) -> tuple[Path, str]:
    torch.save(checkpoint, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a look at the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
def test_detoxify_scores_short_texts_as_its_own_predict(
    bert: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, checkpoint = bert
    model = read_detoxify(*stored(tmp_path / "c.ckpt", checkpoint), folder)
    texts = ["the cat sat", "red sun on a nice day", "blue"]
    own = model.predict(texts)  # type: ignore[attr-defined]
    expected = np.stack([own[name] for name in NAMES], axis=1)
    np.testing.assert_allclose(detoxify_labels(model, texts, batch_size=2), expected, atol=1e-6)
    assert expected.std(0).min() > 1e-4


def test_detoxify_takes_the_worst_window(bert: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, checkpoint = bert
    model = read_detoxify(*stored(tmp_path / "c.ckpt", checkpoint), folder)
    words = np.random.default_rng(3).choice(WORDS, size=60).tolist()
    # 32 positions hold 30 words; windows share 16 of them
    parts = [" ".join(words[start : start + 30]) for start in (0, 14, 28, 42)]
    found = detoxify_labels(model, [" ".join(words), "cat"], batch_size=3)
    np.testing.assert_allclose(found[0], detoxify_labels(model, parts, 8).max(0), atol=1e-6)
    np.testing.assert_allclose(found[1], detoxify_labels(model, ["cat"], 8)[0], atol=1e-6)


def test_detoxify_as_backend(bert: tuple[Path, dict[str, Any]], files: dict[str, Path], tmp_path: Path) -> None:
    folder, checkpoint = bert
    path, digest = stored(tmp_path / "c.ckpt", checkpoint)
    scorer = Toxicity(
        backend="detoxify",
        sets=["toxic"],
        checkpoint=str(path),
        checkpoint_sha256=digest,
        checkpoint_config=str(folder),
    )
    samples = list(scorer.score(Talker({"toxic": ["the cat", "zebra", ""]}, files)))
    means = [sample.value for sample in samples if sample.column == "toxicity_mean"]
    expected = detoxify_labels(read_detoxify(path, digest, folder), ["the cat", "zebra"], 8)[:, 0]
    assert means == pytest.approx([*expected, 0.0], abs=1e-6)


def test_hostile_checkpoint_runs_nothing(bert: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, checkpoint = bert
    path, digest = stored(tmp_path / "c.ckpt", {**checkpoint, "epoch": Bomb(tmp_path / "ran")})
    with pytest.raises(BadRequest, match=r"scorer\.toxicity\.checkpoint: c\.ckpt is not read"):
        read_detoxify(path, digest, folder)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_digest_is_refused(bert: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, checkpoint = bert
    path, digest = stored(tmp_path / "c.ckpt", checkpoint)
    with pytest.raises(BadRequest, match=f"checkpoint_sha256: {'0' * 64}; allowed: {digest}"):
        read_detoxify(path, "0" * 64, folder)


def test_missing_files_are_named(bert: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, digest = stored(tmp_path / "c.ckpt", bert[1])
    with pytest.raises(BadRequest, match=r"scorer\.toxicity\.checkpoint: no such file"):
        read_detoxify(tmp_path / "none.ckpt", digest, bert[0])
    with pytest.raises(BadRequest, match=r"scorer\.toxicity\.checkpoint_config: no config\.json"):
        read_detoxify(path, digest, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "AutoModelForCausalLM"}, "ForSequenceClassification"),
        ({"tokenizer_name": "PreTrainedModel"}, "Tokenizer"),
        ({"num_classes": 7}, "num_classes"),
        ({"huggingface_config_path": "somewhere"}, "exactly"),
    ],
)
def test_checkpoint_that_asks_for_other_classes_is_refused(
    bert: tuple[Path, dict[str, Any]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder, checkpoint = bert
    arch = {"args": {**checkpoint["config"]["arch"]["args"], **change}}
    path, digest = stored(tmp_path / "c.ckpt", {**checkpoint, "config": {**checkpoint["config"], "arch": arch}})
    with pytest.raises(BadRequest, match=message):
        read_detoxify(path, digest, folder)


def test_checkpoint_without_one_of_the_weights_is_refused(
    bert: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, checkpoint = bert
    weights = {key: value for key, value in checkpoint["state_dict"].items() if key != "classifier.bias"}
    path, digest = stored(tmp_path / "c.ckpt", {**checkpoint, "state_dict": weights})
    with pytest.raises(BadRequest, match=r"does not hold classifier\.bias \(1 in all\)"):
        read_detoxify(path, digest, folder)


def test_checkpoint_without_one_of_the_labels_is_refused(
    bert: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, checkpoint = bert
    data = {"args": {"classes": ["rude", *CLASSES[1:]]}}
    path, digest = stored(
        tmp_path / "c.ckpt", {**checkpoint, "config": {**checkpoint["config"], "dataset": data}}
    )
    with pytest.raises(BadRequest, match="no label toxicity"):
        read_detoxify(path, digest, folder)


@pytest.mark.parametrize("checkpoint", [[1, 2], {"config": {}}, {"state_dict": {}, "config": {}}])
def test_what_is_no_checkpoint_is_refused(
    bert: tuple[Path, dict[str, Any]], tmp_path: Path, checkpoint: object
) -> None:
    path, digest = stored(tmp_path / "c.ckpt", checkpoint)
    with pytest.raises(BadRequest, match=r"scorer\.toxicity\.checkpoint"):
        read_detoxify(path, digest, bert[0])
