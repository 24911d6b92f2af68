"""Two offline toxicity classifiers, read as data from other people's packages: a BiLSTM and a linear model.

The BiLSTM (``toxic-comment-classifier``, MIT) gives the six labels of the Jigsaw challenge, which are
Detoxify's; the linear one (``alt-profanity-check``, MIT) gives one probability of profanity and is
independent of it. Both took short comments in training, so that a long text is scored in windows that overlap
by half, and the worst window counts.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignmerge.engine.faults import BadRequest
from eval.scorers.restricted import Record, read_joblib, read_pickle

Item = TypeVar("Item")
LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
LENGTH = 100
"""Words that either classifier looks at together; the BiLSTM's training texts were cut or padded to it."""


def windows(items: Sequence[Item], length: int) -> list[Sequence[Item]]:
    """Cut ``items`` into windows of ``length`` that overlap by at least half and cover everything.

    The last window ends where the items end, so only a short sequence gives a short window.
    """
    if len(items) <= length:
        return [items]
    step = max(1, length // 2)
    ends = [*range(length, len(items), step), len(items)]
    return [items[end - length : end] for end in ends]


class Vocabulary(NamedTuple):
    """How the BiLSTM's texts become numbers: the rules of the Keras text tokenizer."""

    numbers: Mapping[str, int]
    size: int
    """Words with this index or above are dropped, like unknown ones."""
    filters: str
    """Characters that separate words."""

    def ids(self, text: str) -> list[int]:
        """Return the numbers of the known words of ``text`` in order."""
        split = text.lower().translate(str.maketrans(self.filters, " " * len(self.filters))).split(" ")
        found = (self.numbers.get(word) for word in split if word)
        return [at for at in found if at is not None and at < self.size]


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a pickled Keras ``Tokenizer`` without running its code; raises ``BadRequest`` naming the file."""
    names = {
        ("keras.src.legacy.preprocessing.text", "Tokenizer"): Record,
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("builtins", "int"): int,
    }
    state = _attributes(path, read_pickle(path, names))
    _same(path, state, {"lower": True, "split": " ", "char_level": False, "oov_token": None})
    return Vocabulary(state["word_index"], int(state["num_words"]), state["filters"])


class SixLabels(nn.Module):
    """Embedding, bidirectional LSTM, maximum over time, one ReLU layer, six sigmoids; all float32."""

    def __init__(self, words: int, width: int, state: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, state, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * state, hidden)
        self.output = nn.Linear(hidden, len(LABELS))

    def forward(self, ids: Tensor) -> Tensor:
        """Return probabilities (n, 6) for word numbers (n, t); padding is a word of its own, as in Keras."""
        states, _ = self.lstm(self.embedding(ids))
        probabilities: Tensor = torch.sigmoid(self.output(torch.relu(self.hidden(states.amax(1)))))
        return probabilities


def read_six_labels(path: Path) -> SixLabels:
    """Read the Keras weights in the HDF5 file ``path`` into the torch module; the sizes come from the file.

    Keras keeps an LSTM as kernel (d, 4h), recurrent kernel (h, 4h) and bias (4h), gates in the order i, f, c,
    o, which is torch's i, f, g, o, and its dense kernels transposed. Raises ``BadRequest`` naming the file if
    a weight is missing, of another shape or not finite.
    """
    try:
        state = _keras_state(path)
        words, width = state["embedding.weight"].shape
        hidden, both = state["hidden.weight"].shape
        network = SixLabels(words, width, both // 2, hidden)
        network.load_state_dict(state)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise BadRequest.of(path.name, f"not read: {reason}", "the published BiLSTM weights") from None
    if not all(bool(weight.isfinite().all()) for weight in state.values()):
        raise BadRequest.of(path.name, "a weight is not finite", "finite numbers")
    return network.eval()


def _keras_state(path: Path) -> dict[str, Tensor]:
    import h5py

    with h5py.File(path) as file:

        def weight(name: str) -> Tensor:
            return torch.tensor(np.asarray(file[f"layers/{name}"], dtype=np.float32))

        state = {"embedding.weight": weight("embedding/vars/0")}
        for layer, ours in (("dense", "hidden"), ("dense_1", "output")):
            state[f"{ours}.weight"] = weight(f"{layer}/vars/0").T
            state[f"{ours}.bias"] = weight(f"{layer}/vars/1")
        for way, suffix in (("forward_layer", ""), ("backward_layer", "_reverse")):
            cell = f"bidirectional/{way}/cell/vars"
            state[f"lstm.weight_ih_l0{suffix}"] = weight(f"{cell}/0").T
            state[f"lstm.weight_hh_l0{suffix}"] = weight(f"{cell}/1").T
            state[f"lstm.bias_ih_l0{suffix}"] = weight(f"{cell}/2")
            state[f"lstm.bias_hh_l0{suffix}"] = torch.zeros_like(weight(f"{cell}/2"))
    return state


@torch.inference_mode()
def six_labels(
    network: SixLabels, vocabulary: Vocabulary, texts: Sequence[str], batch_size: int
) -> NDArray[np.float64]:
    """Return the six probabilities of each text, float64 (n, 6), each the maximum over its windows.

    A text of which the classifier knows no word gives a row of NaN: it was not scored.
    """
    rows, owners = [], []
    for owner, text in enumerate(texts):
        ids = vocabulary.ids(text)
        for window in windows(ids, LENGTH) if ids else []:
            rows.append([0] * (LENGTH - len(window)) + list(window))
            owners.append(owner)
    parts = [torch.tensor(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    return worst(len(texts), owners, [network(part) for part in parts])


def worst(count: int, owners: Sequence[int], parts: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return the maximum over the windows of each of ``count`` texts, float64 (count, 6).

    ``parts`` stacked are the windows' probabilities (m, 6), ``owners[j]`` the text of window j; a
    text without a window gets NaN.
    """
    scores = np.full((count, len(LABELS)), np.nan)
    if parts:
        np.fmax.at(scores, np.asarray(owners), torch.cat(list(parts)).double().numpy())
    return scores


class Linear(NamedTuple):
    """TF-IDF and an ensemble of k calibrated linear SVMs over V words, taken apart into float64 arrays."""

    numbers: Mapping[str, int]
    token: re.Pattern[str]
    idf: NDArray[np.float64]
    """(V,)"""
    weights: NDArray[np.float64]
    """(k, V)"""
    biases: NDArray[np.float64]
    """(k,)"""
    slopes: NDArray[np.float64]
    """(k,): the a of Platt's 1 / (1 + exp(a f + b))"""
    offsets: NDArray[np.float64]
    """(k,): the b"""

    def probability(self, text: str) -> float:
        """Return the mean probability for the worst window of ``text``; without a known word, the prior."""
        return max(map(self._window, windows(self.token.findall(text.lower()), LENGTH)))

    def _window(self, words: Sequence[str]) -> float:
        counts = Counter(self.numbers[word] for word in words if word in self.numbers)
        at = np.fromiter(counts.keys(), dtype=np.intp, count=len(counts))
        tfidf = np.fromiter(counts.values(), dtype=np.float64, count=len(counts)) * self.idf[at]
        norm = float(np.linalg.norm(tfidf)) or 1.0
        margins = self.weights[:, at] @ (tfidf / norm) + self.biases
        return float(np.mean(1 / (1 + np.exp(self.slopes * margins + self.offsets))))


_TFIDF = ("sklearn.feature_extraction.text", "TfidfVectorizer")
_SVMS = ("sklearn.calibration", "CalibratedClassifierCV")
_SKLEARN = (
    _TFIDF,
    ("sklearn.feature_extraction.text", "TfidfTransformer"),
    _SVMS,
    ("sklearn.calibration", "_CalibratedClassifier"),
    ("sklearn.calibration", "_SigmoidCalibration"),
    ("sklearn.svm._classes", "LinearSVC"),
)


def read_linear(vectorizer: Path, model: Path) -> Linear:
    """Take a pickled scikit-learn TF-IDF and its calibrated SVMs apart; none of their code runs.

    Raises ``BadRequest`` naming the file if it names anything but the six classes expected or was fitted with
    settings that ``Linear`` does not compute.
    """
    names = dict.fromkeys(_SKLEARN, Record)
    text = _attributes(vectorizer, read_joblib(vectorizer, names))
    plain = {"analyzer": "word", "lowercase": True, "ngram_range": (1, 1), "norm": "l2", "use_idf": True}
    off = {
        "binary": False,
        "sublinear_tf": False,
        "strip_accents": None,
        "preprocessor": None,
        "tokenizer": None,
    }
    _same(vectorizer, text, {**plain, **off})
    svms = _attributes(model, read_joblib(model, names))
    try:
        members = [(vars(m.estimator), vars(m.calibrators[0])) for m in svms["calibrated_classifiers_"]]
        linear = Linear(
            text["vocabulary_"],
            re.compile(text["token_pattern"]),
            vars(text["_tfidf"])["idf_"],
            np.stack([svm["coef_"][0] for svm, _ in members]),
            np.array([svm["intercept_"][0] for svm, _ in members]),
            np.array([platt["a_"] for _, platt in members]),
            np.array([platt["b_"] for _, platt in members]),
        )
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise BadRequest.of(model.name, f"not read: {error}", "calibrated linear SVMs over TF-IDF") from None
    if linear.weights.shape[1] != len(linear.idf) or len(linear.numbers) != len(linear.idf):
        raise BadRequest.of(model.name, "not as many words as the vectorizer", "the published pair")
    return linear


def _attributes(path: Path, record: object) -> dict[str, Any]:
    if not isinstance(record, Record):
        raise BadRequest.of(path.name, f"holds a {type(record).__name__}", "the object as published")
    return vars(record)


def _same(path: Path, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    wrong = {key: state.get(key) for key, value in expected.items() if key not in state or state[key] != value}
    if wrong:
        allowed = ", ".join(f"{key}={expected[key]!r}" for key in wrong)
        raise BadRequest.of(path.name, ", ".join(f"{key}={value!r}" for key, value in wrong.items()), allowed)
